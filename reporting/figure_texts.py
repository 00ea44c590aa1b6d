"""What the report says about each figure of a run: heading, description for who cannot see it, and how to read it.

The texts are templates of :mod:`reporting.quotes`.
"""

from __future__ import annotations

from typing import NamedTuple

from reporting.charts import LINEAR_DIFFERENCE


class FigureText(NamedTuple):
    """The texts of one figure.

    Attributes:
        title: the heading above it.
        alt: says in words what the picture shows.
        caption: how to read it.
    """

    title: str
    alt: str
    caption: str


#: By the name of the figure's file, in the order of the report.
FIGURE_TEXTS = {
    "reliability": FigureText(
        "Reliability",
        "Three reliability diagrams with pixel counts below. Foreground ECE: "
        "predictive variance {test.foreground_ece.predictive_variance}, "
        "saliency variance {test.foreground_ece.saliency_variance}, fused score {test.foreground_ece.fused}.",
        "How to read it: each point is a bin of confidence, which is 1 minus the score. On the dotted diagonal, pixels of "
        "confidence 0.8 are right in 80 % of the cases; above it the score is too cautious, below it too sure. The pale "
        "bars are the gaps; the ECE is their mean, weighted by the pixels of the bin, which are counted below on a "
        "logarithmic scale.",
    ),
    "lambda_curve": FigureText(
        "The fusion weight",
        "Foreground ECE against λ on validation and test with 95 % bands; λ = {lambda:general} was chosen. Below, how often "
        "each λ would have been chosen in resamples of the validation images.",
        "How to read it: λ = 0 is saliency variance alone, λ = 1 predictive variance alone. λ is chosen where the "
        "validation curve is lowest; the test curve says whether that holds on other images. The bands are 95 % intervals. "
        "All λ are measured on the same images, so that the bands overlap even where a difference is clear; the paired "
        "intervals are in the table above. The bars show how stable the choice is.",
    ),
    "forest": FigureText(
        "All differences from predictive variance",
        "Forest plot of the difference in foreground ECE between every score or fusion rule and predictive variance. "
        "Saliency variance: {test.foreground_ece_difference.saliency_variance_minus_predictive_variance.value:signed}, "
        "{test.foreground_ece_difference.saliency_variance_minus_predictive_variance.interval:signed_span}. "
        "Fused score: {test.foreground_ece_difference.fused_minus_predictive_variance.value:signed}, "
        "{test.foreground_ece_difference.fused_minus_predictive_variance.interval:signed_span}.",
        "How to read it: a mark is the foreground ECE of a score or fusion rule minus that of min-max normalised predictive "
        "variance, the line its paired 95 % interval over test images; left of zero is better. These intervals hold the "
        "training, the scales and λ fixed, and are too narrow for a conclusion: all rows but the endpoint (diamond) are "
        "exploratory, and the endpoint has its verdict and its full interval in the first table. The axis is linear within "
        f"±{LINEAR_DIFFERENCE:g} and logarithmic beyond.",
    ),
    "risk_coverage": FigureText(
        "Risk and coverage",
        "Two panels of risk against coverage, inside the true lesions and over whole images, for the three scores and an "
        "ideal ranking.",
        "How to read it: keep only the most certain share of the pixels (coverage); the risk is the share of those that are "
        "wrong. A score that finds the errors stays low until the right end; the dotted curve is a perfect ranking. The "
        "legend gives the area under each curve; lower is better. This is about the order of the pixels, not about "
        "calibration.",
    ),
    "dice_uncertainty": FigureText(
        "Dice and uncertainty of the images",
        "Three scatter plots of Dice against the mean uncertainty of each test image. Spearman correlation: "
        "predictive variance {test.ranking_of_images.whole_image.predictive_variance.spearman_with_dice.value:signed}, "
        "saliency variance {test.ranking_of_images.whole_image.saliency_variance.spearman_with_dice.value:signed}, "
        "fused score {test.ranking_of_images.whole_image.fused.spearman_with_dice.value:signed}.",
        "How to read it: a point is a test image. If uncertainty tells bad from good segmentations, the points fall from "
        "the upper left to the lower right, and the Spearman correlation is negative. Below the dotted line (Dice "
        "{test.ranking_of_images.bad_dice_below:general}) lie {test.ranking_of_images.bad_images:count} images. The scales of "
        "the three panels differ.",
    ),
    "training": FigureText(
        "Training",
        "Training and validation loss, and validation Dice, by epoch; the epoch whose weights were kept is marked.",
        "How to read it: the weights of the epoch with the best validation Dice (dotted) made all maps. A curve that still "
        "rises at its end says that the network was not trained to its limit.",
    ),
}

#: Of the figure of pooled trainings; ``$outcomes`` says what came out of each endpoint.
ENDPOINTS_TEXT = FigureText(
    "Endpoints by training and pooled",
    "One panel per endpoint with the difference of every training and, below, the pooled difference. $outcomes.",
    "How to read it: a circle is the difference that one training shows, the diamond their mean with its 95 % interval (thin) "
    "and 90 % interval (thick). Better or worse: the 95 % interval leaves out the line at zero, and does so after Holm's "
    "correction. Equivalent: the thick line stays within the grey margin. Circles that scatter widely say that the answer "
    "depends on the seed. Each panel has its own scale.",
)

# ---------------------------------------------------------------- galleries

GALLERY_ALT = "Test images by rule: $title. One row per image: outlines, mean prediction, two variances, fused score, error."

#: By the name of the gallery's rule.
GALLERY_CAPTIONS = {
    "random": "Drawn by chance, so that they show the ordinary case.",
    "best": "The best segmentations. See whether what uncertainty is left lies where the outlines part.",
    "worst": "The worst segmentations. A useful uncertainty is high where the error map is coloured.",
    "uncertain": "The images about which the fused score is least certain, on average over all their pixels.",
    "complex": "The most complex outlines: perimeter squared over 4π times the area of the truth, about 1 for a disc.",
    "disagreement": "The images on which the two normalised variances differ most: the mean absolute difference of their pixels.",
}

#: Follows the caption of the first gallery.
GALLERY_LEGEND = (
    "Columns: the image with the truth (solid blue) and the prediction (dashed yellow); the mean prediction; the two variances; "
    "the fused score; false positives (orange) and false negatives (blue). A quantity has one colour scale in all rows of "
    "all galleries; the three uncertainties are logarithmic over three decades up to the value that is normalised to 1."
)
