"""The case of given maps: everything from the map file, the overlap as the table of the run has it."""

from __future__ import annotations

import numpy as np
import pytest
from given_maps import arrays_of
from saved_runs import METRICS

from experiment.case_images import Chosen, ImageSet
from experiment.computed_case import saved_case
from experiment.map_files import write_maps
from runtime.errors import UserError


def test_a_saved_case_has_the_maps_of_its_file_and_the_overlap_of_its_masks(tmp_path):
    arrays = arrays_of(8)
    floats = {name: arrays["variance"].astype(np.float32) for name in ("pred_variance", "saliency_variance", "fused_score")}
    prediction = np.zeros((8, 8), np.float32)
    prediction[2:4] = 0.75  # 16 pixels
    truth = np.zeros((8, 8), np.uint8)
    truth[3:6] = 1  # 24, of which 8 are predicted
    maps = {**floats, "mean_prediction": prediction, "true_mask": truth}
    write_maps(tmp_path / "a.npz", maps, -1, "identity")
    chosen = Chosen("a", ImageSet("", ["a"], tmp_path, tmp_path / "per_image.csv", None, None), None, None, "", ())
    case = saved_case(chosen, 0.5, METRICS)
    assert (case.dice, case.jaccard, case.has_image) == (0.4, 0.25, False)  # 2 * 8 / (16 + 24), 8 / 32
    np.testing.assert_array_equal(case.image[2, 0], [191, 191, 191])
    np.testing.assert_array_equal(case.maps["fused_score"], floats["fused_score"])
    assert saved_case(chosen, 0.8, METRICS).dice == 0
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    write_maps(tmp_path / "a.npz", {**maps, "image": image}, -1, "identity")
    case = saved_case(chosen, 0.5, METRICS)
    assert case.has_image
    np.testing.assert_array_equal(case.image, image)
    write_maps(tmp_path / "a.npz", {**maps, "image": image[:4]}, -1, "identity")
    with pytest.raises(UserError, match=r"a.npz: image is uint8 \(4, 8, 3\), not uint8 \(H, W, 3\)"):
        saved_case(chosen, 0.5, METRICS)
