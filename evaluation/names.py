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

#: Added to the code of a pixel that lies inside the band along the predicted boundary.
IN_BAND = 4
#: Outcomes of a pixel, by their code ``2 * truth + predicted + IN_BAND * (inside the band)``.
OUTCOMES = (
    "true_negative", "false_positive", "false_negative", "true_positive",
    "true_negative_in_band", "false_positive_in_band", "false_negative_in_band", "true_positive_in_band",
)
#: Codes of the outcomes whose predicted label equals the truth.
CORRECT = (0, 3, 4, 7)
#: Regions of an image as codes of outcomes; the foreground is the ground-truth lesion.
REGIONS = {
    "foreground": (2, 3, 6, 7),
    "predicted_foreground": (1, 3, 5, 7),
    "union": (1, 2, 3, 5, 6, 7),
    "whole_image": (0, 1, 2, 3, 4, 5, 6, 7),
    "predicted_background": (0, 2, 4, 6),
    "boundary_band": (4, 5, 6, 7),
}
#: Whether one has to know the truth to tell which pixels belong to a region: what is measured there says little about
#: an image without ground truth.
CONDITIONS_ON_TRUTH = {
    "foreground": True,
    "predicted_foreground": False,
    "union": True,
    "whole_image": False,
    "predicted_background": False,
    "boundary_band": False,
}
#: The regions whose scores decide the quantile bins.
QUANTILE_REGIONS = ("foreground", "predicted_foreground", "union", "whole_image")
#: The boundary band reaches this far from the predicted boundary, in pixels of an image with this shorter side.
BAND_REACH, BAND_SIDE = 3, 128

# ---------------------------------------------------------------- images

#: How the uncertainty of the pixels of an image becomes one number: mean over the image, mean over the predicted lesion,
#: 95 % quantile of the pixels, largest mean over a square patch.
AGGREGATES = ("whole_image", "predicted_foreground", "quantile95", "largest_patch")

# ---------------------------------------------------------------- thresholds

#: An image with a lower Dice counts as badly segmented.
BAD_DICE = 0.8
#: A lower Jaccard index counts as 0 in the ISIC challenge's thresholded Jaccard.
ISIC_THRESHOLD = 0.65
