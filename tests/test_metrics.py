"""Scores: against geometry that can be computed by hand, brute force, and laws."""

from __future__ import annotations

import itertools
import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuparse.errors import InputError, MissingDependencyError
from gpuparse.evaluation import EvaluationReport, MetricOptions, score_case
from gpuparse.evaluation.metrics import count_instances
from gpuparse.prompts import parse_class_prompts

SEMANTIC = parse_class_prompts({"1": ["one"], "2": ["two"], "5": ["five"], "instance_label": 0}, "test")
INSTANCES = parse_class_prompts({"3": ["cell"], "instance_label": 1}, "test")
KEPT = MetricOptions(instances="ids")
SMALL_IDS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.integers(0, 4))


def score(labels, prediction, prompts=SEMANTIC, spacing_mm=(1.0, 1.0, 1.0), **options):
    return score_case("DATA", "case", labels, prediction, spacing_mm, prompts, MetricOptions(**options))


@given(SMALL_IDS, st.randoms(use_true_random=False))
def test_dice_is_its_definition(labels, random):
    prediction = np.array([random.choice((0, 1, 2, 5, v)) for v in labels.flat], np.uint16).reshape(labels.shape)
    scores = score(labels, prediction)
    assert [s.class_id for s in scores.classes] == [1, 2, 5]
    expected = []
    for s in scores.classes:
        a, b = set(np.flatnonzero(labels == s.class_id)), set(np.flatnonzero(prediction == s.class_id))
        assert (s.num_label_voxels, s.num_predicted_voxels) == (len(a), len(b))
        if not a and not b:
            assert math.isnan(s.dice)
        else:
            assert s.dice == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        if a:
            expected.append(s.dice)
    assert scores.dice == pytest.approx(np.mean(expected) if expected else math.nan, nan_ok=True)
    assert math.isnan(scores.f1)
    assert scores.instances is None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("tolerance_mm", "agrees"), [(2.9, False), (3.0, True)])
def test_surfaces_agree_up_to_the_tolerance_in_millimetres_along_the_right_axis(axis, tolerance_mm, agrees):
    spacing_mm = [40.0, 40.0, 40.0]
    spacing_mm[axis] = 1.5
    labels, prediction = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    moved = [slice(2, 8)] * 3
    moved[axis] = slice(4, 10)  # two voxels of 1.5 mm
    prediction[tuple(moved)] = 1
    nsd = score(labels, prediction, spacing_mm=tuple(spacing_mm), tolerance_mm=tolerance_mm).classes[0].nsd
    assert (nsd == 1.0) == agrees
    assert nsd > 0  # most of the sides along the axis agree anyhow


def test_surfaces_far_apart_score_zero_and_equal_masks_one():
    labels = np.zeros((30, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    assert score(labels, labels).classes[0].nsd == 1.0
    assert score(labels, np.roll(labels, 20, 0)).classes[0].nsd == 0.0
    halved = labels.copy()
    halved[2:4] = 0
    assert 0 < score(labels, halved, tolerance_mm=0.5).classes[0].nsd < 1


def test_classes_that_are_absent_count_as_in_the_challenge():
    labels = np.ones((3, 4, 5), np.uint8)  # no background: np.unique(x)[1:] would lose class 1
    prediction = labels.copy()
    prediction[0] = 2
    one, two, five = score(labels, prediction).classes
    assert one.dice == pytest.approx(2 * 40 / (60 + 40))
    assert one.counted
    assert (two.dice, two.nsd, two.counted) == (0.0, 0.0, False)  # predicted, not there: shown, not counted
    assert math.isnan(five.dice)
    assert math.isnan(five.nsd)
    assert not five.counted
    assert score(labels, prediction).dice == one.dice
    missed = score(labels, np.zeros_like(labels))
    assert (missed.dice, missed.nsd, missed.classes[0].counted) == (0.0, 0.0, True)
    nothing = score(np.zeros_like(labels), prediction)
    assert math.isnan(nothing.dice)
    assert math.isnan(nothing.nsd)
    foreign = score(np.full((2, 2, 2), 9, np.uint8), np.full((2, 2, 2), 9, np.uint8))
    assert math.isnan(foreign.dice)  # an id without a prompt is nobody's


def brute_force(labels, prediction, min_iou):
    """The most pairs that overlap enough, by trying every assignment."""
    true = [labels == i for i in np.unique(labels) if i]
    found = [prediction == i for i in np.unique(prediction) if i]
    if len(true) > len(found):
        true, found = found, true
    fits = [[(a & b).sum() / (a | b).sum() >= min_iou for b in found] for a in true]
    best = 0
    for order in itertools.permutations(range(len(found)), len(true)):
        best = max(best, sum(fits[i][j] for i, j in enumerate(order)))
    return best


@given(SMALL_IDS, st.sampled_from([0.2, 0.5, 0.75, 1.0]), st.integers(0, 2**32 - 1))
def test_instances_are_matched_as_well_as_can_be(labels, min_iou, seed):
    rng = np.random.default_rng(seed)
    prediction = np.where(rng.random(labels.shape) < 0.3, rng.integers(0, 5, labels.shape), labels).astype(np.uint16)
    counts = count_instances(labels, prediction, MetricOptions(min_iou=min_iou, instances="ids"))
    num_labels, num_predicted = (np.count_nonzero(np.unique(a)) for a in (labels, prediction))
    matched = brute_force(labels, prediction, min_iou)
    assert (counts.num_labels, counts.num_predicted, counts.num_matched) == (num_labels, num_predicted, matched)
    total = num_labels + num_predicted
    assert counts.f1 == pytest.approx(2 * matched / total if total else 0.0)


def test_at_an_overlap_of_exactly_half_an_instance_matches_once():
    labels = np.array([[[1, 1, 0, 2]]], np.uint8)
    prediction = np.array([[[1, 2, 0, 3]]], np.uint8)  # both halves of instance 1 have an IoU of 0.5
    counts = count_instances(labels, prediction, KEPT)
    assert (counts.num_labels, counts.num_predicted, counts.num_matched) == (2, 3, 2)
    assert counts.f1 == pytest.approx(4 / 5)


@given(SMALL_IDS, st.integers(0, 2**32 - 1))
def test_what_the_ids_are_does_not_matter(labels, seed):
    names = np.random.default_rng(seed).permutation(np.arange(1, 70000))[:5]
    renamed = np.concatenate([[0], names])[labels]
    assert count_instances(renamed, labels, KEPT) == count_instances(labels, labels, KEPT)
    assert count_instances(labels, renamed, KEPT).f1 == float(labels.any())


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_instances_are_counted_the_same_in_pieces_of_any_size(monkeypatch, piece):
    rng = np.random.default_rng(piece)
    labels = np.repeat(rng.choice([0, 1, 2, 70000, 2**32 - 1], (3, 4, 5)), 3, axis=2).astype(np.uint32)
    prediction = np.where(rng.random(labels.shape) < 0.2, 9, labels)
    expected = brute_force(labels, prediction, 0.5)
    monkeypatch.setattr("gpuparse.evaluation.metrics._PIECE_VOXELS", piece)
    counts = count_instances(labels, prediction, KEPT)
    assert (counts.num_labels, counts.num_predicted, counts.num_matched) == (4, 5, expected)


def test_ids_as_they_are_give_a_perfect_prediction_a_perfect_score():
    labels = np.zeros((1, 1, 9), np.uint8)
    labels[..., :3] = labels[..., 5:8] = 4  # one id in two parts, and no other
    counts = count_instances(labels, labels, KEPT)
    assert (counts.num_labels, counts.num_predicted, counts.num_matched) == (1, 1, 1)
    assert count_instances(labels, labels).num_predicted == 2  # as the reference counts


def test_components_are_the_instances_as_in_the_reference():
    labels = np.zeros((3, 5, 9), np.uint8)
    labels[:, :, 0:2] = labels[:, :, 4:6] = 7  # one id, two parts
    labels[:, :, 6:8] = 8  # touches a part of the other id
    mask = (labels > 0).astype(np.uint8)
    mask.setflags(write=False)  # as arrays from files are
    assert count_instances(labels, mask).num_labels == 3
    assert count_instances(labels, mask, KEPT).num_labels == 2
    counts = count_instances(labels, mask)
    assert (counts.num_predicted, counts.num_matched) == (2, 2)  # 8 and half of 7 merge: an IoU of exactly 0.5
    diagonal = np.zeros((1, 2, 2), np.uint8)
    diagonal[0, 0, 0] = diagonal[0, 1, 1] = 1
    assert count_instances(diagonal, diagonal).num_labels == 2  # faces connect, corners do not
    many = np.zeros((1, 1, 1200), np.uint8)
    many[..., ::2] = 1
    assert count_instances(many, many).f1 == 1.0  # more than 255 components
    assert count_instances(many, many).num_predicted == 600


def test_byte_order_does_not_matter():
    labels = np.zeros((2, 4, 6), np.uint16)
    labels[:, :, :2], labels[:, :, 4:] = 300, 70
    foreign = labels.astype(">u2")
    assert count_instances(foreign, foreign) == count_instances(labels, labels)
    assert count_instances(foreign, (labels > 0).astype(">i4")).f1 == 1.0


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2), np.int64(1), 1])
def test_numbers_of_any_kind_are_kept_as_pythons(number):
    options = MetricOptions(tolerance_mm=number, min_iou=number)
    assert [type(options.tolerance_mm), type(options.min_iou)] == [float, float]
    assert json.loads(json.dumps(EvaluationReport(options, (), {}).to_json()))["options"] == {
        "tolerance_mm": float(number), "min_iou": float(number), "instances": "components"}  # fmt: skip


def test_instance_cases_have_f1_and_the_foregrounds_dice():
    labels = np.zeros((4, 6, 6), np.uint16)
    labels[:2, :3], labels[2:, 3:] = 300, 256  # 256 is background in uint8
    scores = score(labels, labels, INSTANCES)
    (foreground,) = scores.classes
    assert (foreground.class_id, foreground.dice, foreground.nsd, scores.f1) == (3, 1.0, 1.0, 1.0)
    assert (scores.instances.num_labels, foreground.num_label_voxels) == (2, 72)
    half = np.where(labels == 300, 1, 0)
    scores = score(labels, half, INSTANCES)
    assert scores.dice == pytest.approx(2 * 36 / (72 + 36))
    assert scores.f1 == pytest.approx(2 / 3)
    nothing = np.zeros_like(labels)
    assert score(labels, nothing, INSTANCES).f1 == 0.0
    assert score(nothing, labels, INSTANCES).f1 == 0.0
    assert score(nothing, nothing, INSTANCES).f1 == 0.0  # the challenge's count


def test_what_cannot_be_scored_is_refused(monkeypatch):
    zeros = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(InputError, match=r"DATA, case 'case': the prediction has shape \(2, 3, 5\), the labels \(2, 3"):
        score(zeros, np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(InputError, match=r"the prediction has shape \(3, 4\), the labels \(3, 4\); expected equal sh"):
        score(zeros[0], zeros[0])
    with pytest.raises(InputError, match=r"prediction is a list; expected a numpy array \(z, y, x\)"):
        score(zeros, zeros.tolist())
    for spacing_mm in (None, (1, 1), (1, 1, 0), (1, 1, math.inf), "abc"):
        with pytest.raises(InputError, match=r"spacing_mm is .*; expected three positive millimetre values"):
            score(zeros, zeros, spacing_mm=spacing_mm)
    for options, message in (
        ({"tolerance_mm": -1.0}, r"tolerance_mm is -1\.0; expected 0 or more"),
        ({"tolerance_mm": math.nan}, r"tolerance_mm is nan; expected 0 or more"),
        ({"tolerance_mm": None}, r"tolerance_mm is None; expected 0 or more"),
        ({"min_iou": 0.0}, r"min_iou is 0\.0; expected above 0, at most 1"),
        ({"min_iou": "0.5"}, r"min_iou is '0\.5'; expected above 0, at most 1"),
        ({"instances": "both"}, r"instances is 'both'; expected 'components' or 'ids'"),
    ):
        with pytest.raises(InputError, match=message):
            MetricOptions(**options)
    monkeypatch.setitem(sys.modules, "surface_distance", None)
    with pytest.raises(MissingDependencyError, match=r"surface_distance is needed to score.*gpuparse\[evaluation\]"):
        score(zeros + 1, zeros + 1)
