"""A network of the user's: made by its factory, tried before anything else, its weights loaded, its identity."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import constructed_networks
import pytest
import torch
from constructed_networks import SmallNet, pictures, unet
from torch import nn

import experiment.networks
from experiment.network_checks import check_network
from experiment.networks import UserNetwork, architecture, build, load_network, network_inputs, take_weights
from model import UNet
from runtime.checkpoints import save_checkpoint, state_fingerprint
from runtime.config import Config
from runtime.errors import UserError
from runtime.processes import ProcessGroup
from uncertainty import active_dropout, uncertainty_maps

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
CONFIG = Config(model="constructed_networks:with_dropout", target_layer="bottom", image_size=32)
PLAIN = replace(CONFIG, model="constructed_networks:plain")


@pytest.fixture
def factory(monkeypatch):
    """Makes the configuration of a factory."""

    def name(function, **changes):
        monkeypatch.setattr(constructed_networks, "chosen", function, raising=False)
        return replace(CONFIG, model="constructed_networks:chosen", **changes)

    return name


def complaint(config: Config) -> str:
    with pytest.raises(UserError) as error:
        check_network(config)
    return str(error.value)


# ---------------------------------------------------------------- the factory


def test_no_model_is_the_u_net_whose_weights_follow_the_seed():
    config = Config(width=2, seed=3, dropout=0.4, upsampling="transposed")
    network = build(config)
    assert isinstance(network, UNet) and network.options["dropout"] == 0.4
    torch.manual_seed(3)
    assert state_fingerprint(UNet(2, 0.4, "transposed").state_dict()) == state_fingerprint(network.state_dict())
    assert network_inputs(config) == {}


def test_a_network_keeps_the_names_of_its_weights_and_starts_from_the_seed():
    network = build(CONFIG)
    assert list(network.state_dict()) == list(SmallNet().state_dict())
    torch.manual_seed(CONFIG.seed)
    assert state_fingerprint(constructed_networks.with_dropout().state_dict()) == state_fingerprint(network.state_dict())
    assert state_fingerprint(build(CONFIG).state_dict()) == state_fingerprint(network.state_dict())
    assert state_fingerprint(build(replace(CONFIG, seed=1)).state_dict()) != state_fingerprint(network.state_dict())


def test_modules_of_the_current_directory_are_found_but_none_in_place_of_ours(tmp_path):
    (tmp_path / "mine.py").write_text("from constructed_networks import with_dropout\nclass Nets:\n    net = with_dropout\n")
    (tmp_path / "model.py").write_text("raise SystemExit('imported in place of the project\\'s')\n")
    program = (
        "from experiment.networks import build, UNet\nfrom runtime.config import Config\n"
        "print(type(build(Config(model='mine:Nets.net', target_layer='x')).network).__name__)\n"
        "import model\nprint(model.__file__)"
    )
    root, tests = Path(experiment.networks.__file__).parents[1], Path(constructed_networks.__file__).parent
    said = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:1] = [{str(root)!r}, {str(tests)!r}]\n{program}"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert said.stdout.split() == ["SmallNet", str(root / "model.py")], said.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", "--model nets is not of the form package:function"),
        ("no_such_module:f", "there is no module no_such_module in .* or on PYTHONPATH"),
        ("constructed_networks:nothing", "there is no nothing in .*constructed_networks.py; name a function"),
        ("constructed_networks:HEIGHT", "names a int; name a function that takes no argument"),
        ("constructed_networks:block", r"the factory raised TypeError: block\(\) missing 2 .* \(.*networks.py, line \d+\)"),
        ("constructed_networks:pictures", "returned a Tensor instead of a torch.nn.Module"),
    ],
)
def test_a_factory_that_is_none_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        build(replace(CONFIG, model=name))


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "needs_more.py").write_text("x = 1\nimport absent_package_of_theirs\n")
    (tmp_path / "breaks.py").write_text("x = 1\n\nx[0]\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    for name, message in (
        ("needs_more", r"importing needs_more raised ModuleNotFoundError: No module named 'absent.*needs_more.py, line 2\)"),
        ("breaks", r"importing breaks raised TypeError: 'int' object is not subscriptable \(.*breaks.py, line 3\)"),
        ("leaves", r"importing leaves raised SystemExit: 3 \(.*leaves.py, line 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            build(replace(CONFIG, model=f"{name}:net"))


def test_one_network_for_all_calls_is_refused(factory):
    only = SmallNet(nn.Dropout(0.5))
    config = factory(lambda: only)
    build(config)
    with pytest.raises(UserError, match="returned the same network twice; make a new one in each call"):
        build(config)


# ---------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("in_a_dictionary", None), ("in_a_dictionary", "out"), ("under_another_key", "mask"), ("in_a_tuple", "1"),
        ("in_a_tuple", "-1"),
    ],
)
def test_logits_are_found_in_what_it_returns(name, output):
    config = replace(CONFIG, model=f"constructed_networks:{name}", output=output, target_layer="inner.bottom")
    check_network(config)
    network, images = build(config).eval(), pictures(2, 32, 32)
    assert torch.equal(network(images), network.network.inner(images))


@pytest.mark.parametrize(
    ("wrap", "output", "message"),
    [
        (lambda z: {"a": z, "b": z[0]}, None,
         r"returned a dict with a \(\(2, 1, 32, 32\) float32\), b \(\(1, 32, 32\) float32\); name the logits with --output"),
        (lambda z: (z, z), None, r"returned a tuple with 0 \(.*\), 1 \(.*\); name the logits with --output"),
        (lambda z: (z, z), "2", r"returned a tuple with nothing under '2' but 0 \(.*\), 1 \(.*\)"),
        (lambda z: z, "out", r"returned one tensor, \(2, 1, 32, 32\) float32; leave --output out"),
        (lambda z: z[..., ::2, ::2], None, r"returned \(2, 1, 16, 16\) float32 for images "
         r"\(2, 3, 32, 32\), but one logit per pixel is expected, \(2, 1, 32, 32\); upsample them"),
        (lambda z: torch.cat([z, -z], 1), None, r"returned \(2, 2, 32, 32\) .*; of two classes, return the difference"),
        (lambda z: z.flatten(), None, r"returned \(2048,\) float32 for"),
        (lambda z: (z > 0), None, "returned .* bool; logits are floating-point numbers"),
        (lambda z: "logits", None, "returned a str, but a tensor of logits is expected"),
        (lambda z: None, None, "returned a NoneType, but a tensor of logits is expected"),
        (lambda z: z / 0, None, "returned logits that are NaN or infinite in training mode; look at its weights"),
        (lambda z: z.detach(), None, "the logits are cut off from the images, by no_grad or detach"),
        (lambda z: z.sigmoid(), None, "returns probabilities, as its last step is a sigmoid; return the logits before it"),
        (lambda z: z + torch.rand(()), None, "draws random numbers of its own in evaluation mode"),
        (lambda z: z.no_such_method(), None, "a forward pass of images .* in training mode raised AttributeError: .*py, line"),
    ],
)
def test_other_outputs_are_one_line(factory, wrap, output, message):
    assert_match(message, complaint(factory(lambda: constructed_networks.Returning(wrap), output=output)))


def assert_match(pattern: str, text: str) -> None:
    with pytest.raises(UserError, match=pattern):
        raise UserError(text)
    assert "\n" not in text


def test_what_changes_with_the_mode_is_noticed(factory):
    class Deep(SmallNet):
        def forward(self, x):
            z = super().forward(x)
            return [z, z] if self.training else z

    assert_match(r"in training mode|returned a list with 0", complaint(factory(lambda: Deep(nn.Dropout(0.5)))))


def test_a_check_leaves_no_trace(factory):
    state = torch.random.get_rng_state()
    before = build(CONFIG)
    torch.random.set_rng_state(state)
    check_network(CONFIG)
    assert state_fingerprint(build(CONFIG).state_dict()) == state_fingerprint(before.state_dict())
    assert before.training and not any(module._forward_hooks for module in before.modules())


# ---------------------------------------------------------------- dropout


def test_a_network_without_dropout_hears_of_the_flag():
    assert_match("the network has no dropout module with p > 0: .*; --insert-dropout P adds", complaint(PLAIN))


def test_dropout_that_is_not_on_the_way_to_the_logits(factory):
    class Aside(SmallNet):
        def forward(self, x):
            self.dropout(x)
            return SmallNet.forward(self, x) if isinstance(self.dropout, nn.Identity) else self.without(x)

        def without(self, x):
            kept, self.dropout = self.dropout, nn.Identity()
            z = super().forward(x)
            self.dropout = kept
            return z

    told = complaint(factory(lambda: Aside(nn.Dropout(0.5))))
    assert_match("its dropout does not reach the logits, so that all passes would be the same; .* or give --insert-dropout", told)


def test_dropout_whose_masks_have_no_seed(factory):
    assert_match("dropout of type AlphaDropout is not supported", complaint(factory(lambda: SmallNet(nn.AlphaDropout(0.5)))))


def test_dropout_is_inserted_after_the_blocks_of_the_decoder_and_no_weight_is_renamed():
    network = build(replace(PLAIN, insert_dropout=0.25))
    assert network.sites == ["dropout", "up2"]
    assert [module.p for module in active_dropout(network)] == [0.25, 0.25]
    assert list(network.state_dict()) == list(SmallNet().state_dict())
    told = check_network(replace(PLAIN, insert_dropout=0.25))
    assert str(told) == (
        f"constructed_networks:plain, {sum(p.numel() for p in SmallNet().parameters()):,} parameters, "
        "Grad-CAM at bottom (8 x 8 x 8), dropout inserted after dropout, up2"
    )


def test_inserted_dropout_is_dropout_of_the_network_itself():
    # inserted into the U-Net without dropout, it is that of the U-Net
    given = unet()
    config = replace(CONFIG, model="constructed_networks:unet_without_dropout", insert_dropout=0.2, target_layer="encoder4")
    network = build(config).eval()
    network.load_state_dict(given.state_dict())
    assert network.sites == ["dropout", "decoder4", "decoder3", "decoder2"]
    images = pictures(2, 32, 32)
    ours = uncertainty_maps(given, images, target_layer=given.encoder4, passes=5, method="general")
    theirs = uncertainty_maps(network, images, target_layer=network.network.encoder4, passes=5)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs))
    assert float(ours.pred_variance.max()) > 0 and float(ours.saliency_variance.max()) > 0


def test_the_activations_of_a_layer_with_inserted_dropout_are_its_own():
    network = build(replace(PLAIN, insert_dropout=0.5)).eval()
    maps = uncertainty_maps(network, pictures(1, 32, 32), target_layer=network.network.up2, passes=6)
    assert float(maps.pred_variance.max()) > 0


def test_a_network_with_no_map_to_drop_from(factory):
    told = complaint(factory(lambda: nn.Conv2d(3, 1, 1), insert_dropout=0.5))
    assert_match("--insert-dropout found no layer of constructed_networks:chosen .*; put nn.Dropout", told)


# ---------------------------------------------------------------- the target layer


CANDIDATES = r"give --target-layer one of down1 \(4 x 32 x 32\), down2 \(6 x 16 x 16\), bottom \(8 x 8 x 8\), "


def test_an_unknown_layer_lists_those_there_are():
    for layer in ("encoder4", "", "bottom.9"):
        assert_match(f"there is no layer '{layer}' in constructed_networks:with_dropout; {CANDIDATES}",
                     complaint(replace(CONFIG, target_layer=layer)))


def test_a_layer_that_will_not_do_says_why(factory):
    assert_match(f"the logits of .* do not depend on the layer auxiliary; {CANDIDATES}",
                 complaint(replace(CONFIG, target_layer="auxiliary")))

    class Odd(SmallNet):
        def __init__(self):
            super().__init__(nn.Dropout(0.5))
            self.dead, self.idle, self.flat = block_of_zeros(), nn.ReLU(), nn.Flatten()

        def forward(self, x):
            return super().forward(x) + torch.relu(self.dead(x) - 1e3) + self.flat(x)[:, :1, None, None] * 1e-3

    def block_of_zeros():
        return nn.Conv2d(3, 1, 1)

    for layer, message in (
        ("dead", "the gradient of the logits at the layer dead of .* is zero everywhere: what follows it is dead"),
        ("idle", "the layer idle of .* is not called, or does not return one tensor"),
        ("flat", r"the layer flat of .* returns \(B, 3072\), but feature maps \(B, C, h, w\) are needed"),
    ):
        assert_match(f"{message}; {CANDIDATES}", complaint(factory(Odd, target_layer=layer)))


def test_a_last_layer_of_zeros_hides_no_gradient_while_it_is_to_be_trained(factory, tmp_path):
    def zeros():
        network = SmallNet(nn.Dropout(0.5))
        nn.init.zeros_(network.head.weight)
        return network

    config = factory(zeros)
    assert "bottom (8 x 8 x 8)" in str(check_network(config))
    torch.save(zeros().state_dict(), tmp_path / "zeros.pth")
    told = complaint(replace(config, model_weights=str(tmp_path / "zeros.pth")))
    assert_match("the gradient of the logits at the layer bottom of .* is zero everywhere", told)


def test_dropout_in_front_of_the_target_alone_is_said():
    assert ", all dropout in front of it" in str(check_network(replace(CONFIG, target_layer="up1")))
    assert "in front of" not in str(check_network(CONFIG))


def test_a_layer_that_no_dropout_touches(factory):
    class Aside(SmallNet):
        def __init__(self):
            super().__init__(nn.Dropout(0.5))
            self.aside, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return super().forward(x) + self.last(torch.relu(self.aside(x)))

    told = complaint(factory(Aside, target_layer="aside"))
    assert_match("no dropout of .* changes the heatmap at the layer aside: it is the same in all passes; give", told)


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(5)
    return SmallNet().state_dict()


@pytest.mark.parametrize("nest", [
    lambda state: state,
    lambda state: {"epoch": 3, "state_dict": state},
    lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    lambda state: {"hyper_parameters": {"lr": 1}, "state_dict": {f"model.module.{name}": t for name, t in state.items()}},
    lambda state: {"model_state_dict": {name: t.half() if t.is_floating_point() else t for name, t in state.items()}},
])
def test_weights_are_found_in_what_training_programs_write(tmp_path, weights, nest):
    torch.save(nest(weights), tmp_path / "w.pth")
    config = replace(CONFIG, model_weights=str(tmp_path / "w.pth"))
    check_network(config)
    take_weights(config, tmp_path / "run", "identity")
    network = load_network(tmp_path / "run" / "weights" / "best_model.pth", config, ALONE)
    assert isinstance(network, UserNetwork) and not network.training
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=2e-3), name
    assert network_inputs(config)["weights"] == state_fingerprint(network.state_dict())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "up2.0.weight"), r"does not fit constructed_networks:with_dropout: up2.0.weight is missing \(3"),
        (lambda s: {**s, "more.weight": torch.ones(1)}, "does not fit .*: more.weight is unexpected"),
        (lambda s: {**s, "head.bias": torch.ones(2)}, r"does not fit .*: head.bias is \(2,\) instead of \(1,\)"),
        (lambda s: {**s, "head.bias": torch.tensor([float("nan")])}, "holds NaN or infinity in head.bias"),
        (lambda s: {"weights": s}, "holds no state dictionary, by itself or under state_dict, model_state_dict, model"),
        (lambda s: [1, 2], "holds no state dictionary"),
        (lambda s: SmallNet(), r"is no file of weights alone \(\w+\); write one with torch.save\(network.state_dict\(\), FILE\)"),
    ],
)
def test_weights_that_will_not_do_are_one_line(tmp_path, weights, change, message):
    path = tmp_path / "w.pth"
    torch.save(change(weights), path)
    assert_match(f"--model-weights {path} {message}", complaint(replace(CONFIG, model_weights=str(path))))


def test_a_file_of_weights_that_is_none(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    assert_match("is no file of weights alone", complaint(replace(CONFIG, model_weights=str(tmp_path / "text.pth"))))
    for path in ("absent.pth", "."):
        assert_match("cannot read --model-weights", complaint(replace(CONFIG, model_weights=str(tmp_path / path))))


def test_a_checkpoint_of_another_network_does_not_fit(tmp_path):
    save_checkpoint(tmp_path / "x.pth", {"model": UNet(2).state_dict(), "options": UNet(2).options})
    with pytest.raises(UserError, match="x.pth does not fit the model it describes"):
        load_network(tmp_path / "x.pth", CONFIG, ALONE)
    save_checkpoint(tmp_path / "x.pth", {"model": SmallNet().state_dict(), "options": {}})
    with pytest.raises(UserError, match="x.pth does not fit the model it describes"):
        load_network(tmp_path / "x.pth", Config(width=2), ALONE)


# ---------------------------------------------------------------- identity


def test_the_identity_knows_the_architecture_and_where_dropout_was_inserted(factory):
    inputs = network_inputs(replace(PLAIN, insert_dropout=0.5))
    assert inputs == {"architecture": architecture(build(PLAIN)), "inserted_dropout": ["dropout", "up2"]}
    fingerprints = [network_inputs(factory(make))["architecture"] for make in (
        SmallNet, lambda: SmallNet(nn.Dropout(0.5)), lambda: SmallNet(nn.Dropout(0.25)), lambda: UNet(2))]
    assert len(set(fingerprints)) == 4 and fingerprints[0] == inputs["architecture"]


def test_addresses_in_a_description_are_no_difference(factory):
    class Described(SmallNet):
        def extra_repr(self):
            return repr(object())

    assert architecture(build(factory(Described))) == architecture(build(factory(Described)))
