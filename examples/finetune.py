"""Finetunes a small text-prompted U-Net on the sample volumes, on CPU or CUDA, in one process or under torchrun.

    python examples/finetune.py
    torchrun --nproc-per-node 2 examples/finetune.py

Stop it at any time and run the same command again: it goes on with the batch after its last checkpoint.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset

import gpuparse
from gpuparse.sample_data import make_sample_data


def block(num_in: int, num_out: int) -> nn.Sequential:
    """Two convolutions."""
    first = [nn.Conv2d(num_in, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(num_out, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.ReLU())


class PromptUNet(nn.Module):
    """Image features at every pixel, times the embedding of a prompt, make that prompt's mask."""

    def __init__(self, width: int = 16, vocabulary: int = 4093) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(map(block, [3, *widths], [*widths, 8 * width]))
        self.up = nn.ModuleList(block(3 * w, w) for w in reversed(widths))
        self.words = nn.EmbeddingBag(vocabulary, width)

    def forward(self, image: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """(batch, 3, height, width) 0..255 and prompts joined by [SEP] -> logits (batch, prompts, height, width)."""
        x, skipped = image / 127.5 - 1, []
        for number, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if number else x)
            skipped.append(x)
        for layer, skip in zip(self.up, reversed(skipped[:-1]), strict=True):
            x = layer(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], dim=1))
        prompts = [prompt.lower().split() for text in texts for prompt in text.split("[SEP]")]
        # A word's number is a hash of its letters; a prompt is the mean of its words.
        words = [int.from_bytes(word.encode(), "big") % self.words.num_embeddings for row in prompts for word in row]
        starts = torch.tensor([0, *map(len, prompts[:-1])]).cumsum(0)
        embedded = self.words(torch.tensor(words).to(x.device), starts.to(x.device))
        return torch.einsum("bchw,bpc->bphw", x, embedded.reshape(len(texts), -1, x.shape[1]))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and Dice loss; labels are masks, or maps of instances."""
    target, found = (labels > 0).float(), logits.sigmoid()
    dice = (2 * (found * target).sum((2, 3)) + 1) / ((found + target).sum((2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - dice.mean()


def main(options: argparse.Namespace) -> None:
    """Trains; every rank runs this."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    roots = [options.out / "stores" / name for name in ("SAMPLE_CT", "SAMPLE_CELLS")]
    if rank == 0 and not all((root / "train.zarr").exists() for root in roots):
        gpuparse.convert(make_sample_data(options.out / "data"), out_dir=options.out / "stores")
    if world_size > 1:
        dist.barrier()

    datasets = [gpuparse.SliceDataset(root, img_size=[options.size] * 2, present_fraction=0.5) for root in roots]
    data = ConcatDataset([Subset(d, range(0, len(d), options.every_nth)) for d in datasets])
    loader = gpuparse.DataLoader(data, options.batch_size, shuffle=True, drop_last=True, seed=1)
    torch.manual_seed(1)
    model = PromptUNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists():
        for name, state in torch.load(checkpoint, map_location=device).items():
            parts[name].load_state_dict(state)
    if rank == 0 and loader.epoch >= options.epochs:
        print(f"{checkpoint}: {loader.epoch} epochs are done. More of them with --epochs; remove it to begin anew.")
    train = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    def save() -> None:
        if rank == 0:  # the loader's state is the same on every rank
            torch.save({name: part.state_dict() for name, part in parts.items()}, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)  # there whole or not at all

    while loader.epoch < options.epochs:
        epoch, num_done = loader.epoch, loader.state_dict()["position"] // (options.batch_size * world_size)
        waiting = computing = 0.0
        start = time.perf_counter()
        for step, batch in enumerate(loader, start=num_done + 1):
            arrived = time.perf_counter()
            loss = loss_of(train(batch["image"].to(device), batch["text"]), batch["labels"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.item()  # waits for the GPU, so that the times are true
            waiting, computing = waiting + arrived - start, computing + time.perf_counter() - arrived
            if rank == 0 and step % options.print_every == 0:
                speed = (step - num_done) * options.batch_size * world_size / (waiting + computing)
                share = waiting / (waiting + computing)
                print(
                    f"epoch {epoch} step {step}: loss {value:.6f}, {speed:.1f} samples/s, {share:.1%} waiting for data"
                )
            if step % options.save_every == 0:
                save()
            start = time.perf_counter()
        save()
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpuparse-demo"), help="sample data, stores and checkpoint")
    defaults = {"epochs": 3, "batch-size": 8, "size": 256, "every-nth": 1, "save-every": 20, "print-every": 5}
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"({default})")
    main(parser.parse_args())
