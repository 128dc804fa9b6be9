"""`mirror="auto"`: which of the class names of public datasets name a side, as names and as prompts made of them."""

from __future__ import annotations

import pytest

from gpuparse.prompts import parse_class_prompts
from gpuparse.proposal import propose_prompts
from gpuparse.sampling import names_a_side

WITH_A_SIDE = {
    "AMOS": "right kidney, left kidney, right adrenal gland, left adrenal gland",
    "BTCV": "rkid, lkid, RKid, LKid, rkidney, Lkidney, RAG, LAG",
    "FLARE": "RK, LK, Right Adrenal Gland (RAG), Left Adrenal Gland (LAG)",
    "WORD": "left_kidney, right_kidney, left_head_of_femur, right_head_of_femur",
    "CHAOS": "Right Kidney, LEFT KIDNEY",
    "TotalSegmentator": "kidney_right, adrenal_gland_left, lung_upper_lobe_left, lung_middle_lobe_right, "
    "iliac_artery_left, brachiocephalic_vein_right, common_carotid_artery_left, atrial_appendage_left, humerus_left, "
    "scapula_right, clavicula_left, femur_right, hip_left, gluteus_maximus_left, autochthon_right, iliopsoas_left, "
    "rib_left_1, rib_right_12, heart_ventricle_left, heart_atrium_right, parotid_gland_left, eye_lens_right",
    "radiotherapy (TG-263)": "Parotid_L, Glnd_Lacrimal_R, OpticNrv_R, Femur_Head_L, A_Carotid_L, Lung_LUL, Kidney_R, "
    "BrachialPlex_L, Eye_L, Hippocampus_R, Lens-L",
    "HaN-Seg, StructSeg": "ParotidL, OpticNerveR, TemporalLobe_L, TMjoint_R, Cochlea_R, Glnd_Submand_L, A_Carotid_R",
    "CamelCase": "LeftKidney, RightKidney, leftKidney, kidneyLeft, lungRight, KidneyL, LKidney, RLung, lKidney, LVMyo",
    "small letters": "kidney_l, lung_r, hip_l, eye-r, lung (l), lv, rv, lvot, lv cavity, rv_blood_pool, leftkidney, "
    "leftmost nodule, rightward shift, lh, ctx-rh-cuneus, rt lung, lt hilum, lul",
    "ACDC, M&Ms, MM-WHS": "LV, RV, LA, RA, LV myocardium, RV cavity, LVC, LVBP, RVBP, left_atrium, LAA",
    "MSD, LAScarQS": "left atrium, Left Atrium Wall, LA wall",
    "TopCoW": "R-PCA, L-PCA, R-ICA, L-MCA, RICA, LICA, LMCA, R-Pcom, L-ACA, LVA, RSCA",
    "coronary arteries": "LAD, LCX, RCA, LCA, LMCA",
    "FreeSurfer": "Left-Cerebral-White-Matter, Right-Lateral-Ventricle, ctx-lh-bankssts, wm_rh_cuneus",
    "lobes": "RUL, RML, RLL, LUL, LLL, left upper lobe",
    "anatomists": "arteria carotis dextra, ventriculus sinister, lobus sinistrum, A. renalis sinistra",
    "radiologists": "Lt. lung, Rt kidney, RT KIDNEY, R. hemithorax, mass in the RUQ, left-sided effusion, lesion (R)",
}

WITHOUT = {
    "AMOS": "spleen, gall bladder, esophagus, liver, stomach, aorta, arota, postcava, pancreas, duodenum, bladder, "
    "prostate/uterus",
    "BTCV": "spl, gall, eso, liv, sto, aor, ivc, IVC, veins, pan, portal vein and splenic vein",
    "FLARE": "inferior vena cava, IVC, gallbladder, liver tumor",
    "WORD, CHAOS, KiTS, LiTS": "intestine, colon, rectum, adrenal, head_of_femur, kidney, tumor, cyst, HCC, Liver",
    "TotalSegmentator": "small_bowel, urinary_bladder, prostate, vertebrae_L5, vertebrae_L1, vertebrae_S1, "
    "vertebrae_T12, vertebrae_C1, sacrum, heart, aorta, pulmonary_vein, superior_vena_cava, "
    "portal_vein_and_splenic_vein, spinal_cord, brain, skull, sternum, costal_cartilages, "
    "trachea, thyroid_gland, vertebral_body, intervertebral_discs",
    "VerSe, lumbar spine": "L5, L6, L1-L5, vertebra L3, L-spine, L spine MRI, LSpine, lumbar spine, spinal canal, "
    "disc L4/L5",
    "radiotherapy": "SpinalCord, BrainStem, OpticChiasm, Larynx, Lips, Bone_Mandible, Cavity_Oral, GTVp, GTVn, CTV, "
    "PTV, GTV in pre-RT MRI, tumour in mid-RT MRI, RT dose, RTplan, RTSTRUCT, PRV, LNs, LN, lymph_node",
    "BraTS, ISLES, MSD": "edema, ET, NCR, enhancing tumor, whole_tumor, WT, TC, RC, Anterior, Posterior, PZ, TZ, "
    "hepatic vessel, lesion, ischemic stroke, pancreas, resection cavity",
    "ACDC, M&Ms, MM-WHS": "MYO, Myo, myocardium, AO, PA, ascending aorta, endocardium, ED, ES, LGE, LVEF",
    "TopCoW": "BA, Acom, 3rd-A2, basilar artery",
    "FreeSurfer": "Brain-Stem, CSF, 3rd-Ventricle, WM-hypointensities, CC_Posterior, Optic-Chiasm",
    "microscopy": "nucleus, cell, mitochondria, RNA, mRNA, RBC, WBC, Ki67, synapse, lumen, all_cells, lamella",
    "pathology and others": "optic disc, optic cup, polyp, melanoma, bright spot, upright chest film, cleft lip, "
    "copyright, leftover contrast, Wright stain, alright, all organs, 5 mL cyst, T1-weighted, R1, R2*, T1rho, CTLs, "
    "L'aorte, Lateral ventricle, collateral artery, clear cell carcinoma, RCC, LCIS, rectal tumor, la prostata, "
    "PET-CT, bilateral pleura, Radius, Rib, lens, lung, lobe, lip, lamina, larynx, retina, ribs, Lunate, Rectum",
}


def cases(table):
    return [pytest.param(name.strip(), id=f"{dataset}: {name.strip()}")
            for dataset, names in table.items() for name in names.split(", ")]  # fmt: skip


def found(name):
    """What is found in the name alone, and in each of the prompts that a proposal makes of it."""
    proposed = [text for modality in (None, "CT", "MR") for text in propose_prompts({1: name}, modality)["1"]]
    return [
        names_a_side(parse_class_prompts({"1": text, "instance_label": 0}, "here")) is not None
        for text in (name, *proposed)
    ]


@pytest.mark.parametrize("name", cases(WITH_A_SIDE))
def test_a_side_is_seen(name):
    assert all(found(name))


@pytest.mark.parametrize("name", cases(WITHOUT))
def test_no_side_is_seen(name):
    assert not any(found(name))
