"""Names and constants that the evaluation and the report of its results share; loads no other package."""

from __future__ import annotations

#: Of ``metrics.json``.
SCHEMA_VERSION = 1

# ---------------------------------------------------------------- maps and scores

#: The two variances among the maps of an image.
PREDICTIVE = "pred_variance"
SALIENCY = "saliency_variance"

#: All uncertainty scores, in the order of every table.
SCORES = (
    "predictive_variance",
    "saliency_variance",
    "fused",
    "predictive_entropy",
    "mutual_information",
    "one_minus_max_probability",
)
#: The scores of the paper.
HEADLINE = ("predictive_variance", "saliency_variance", "fused")
#: The score that every other one is compared with.
REFERENCE = "predictive_variance"

#: The spacing of confidences ``1 - u`` in float32; anything smaller is rounding.
CONFIDENCE_STEP = 2.0**-24

# ---------------------------------------------------------------- outcomes and regions

#: Outcomes of a pixel, by their code ``2 * truth + predicted``.
OUTCOMES = ("true_negative", "false_positive", "false_negative", "true_positive")
#: Codes of the outcomes whose predicted label equals the truth.
CORRECT = (0, 3)
#: Regions of an image as codes of outcomes; the foreground is the ground-truth lesion.
REGIONS = {
    "foreground": (2, 3),
    "predicted_foreground": (1, 3),
    "union": (1, 2, 3),
    "whole_image": (0, 1, 2, 3),
}

# ---------------------------------------------------------------- thresholds

#: An image with a lower Dice counts as badly segmented.
BAD_DICE = 0.8
#: A lower Jaccard index counts as 0 in the ISIC challenge's thresholded Jaccard.
ISIC_THRESHOLD = 0.65
