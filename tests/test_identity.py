"""Distances of persons: the face networks against their definitions written out once more, as functions; their names
and sizes as published; the alignment against least squares and known transforms; and the paper people's distance."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from model import identity
from model.builtin import BUILT_IN
from model.errors import UserError
from model.identity import ArcFace, FaceNet, InceptionResnetV1, IResNet, align, load_identity, similarity
from paper_people import identity as people
from paper_people import world

BLOCKS = (1, 1, 2, 1)
TEMPLATE = np.array(identity.TEMPLATE)


def random_state(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A value for everything, the norms' running statistics too; activations stay near 1."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, tensor in module.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
        noise = torch.randn(tensor.shape, generator=generator) * fan_in**-0.5
        around = 0.25 if "prelu" in name else float(name.endswith("running_var") or name.endswith("weight"))
        state[name] = noise if tensor.ndim > 1 else around + noise
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
    return state


def on_meta(build) -> torch.nn.Module:
    with torch.device("meta"):
        return build()


def network(build, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    module = on_meta(build)
    module.load_state_dict(random_state(module), assign=True)
    return module.to(dtype).eval().requires_grad_(False)


def faces(count: int, size: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in coarse]


# The networks

def norm(state, name, x, eps):
    mean, var, weight, bias = (
        state[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 2))
        for part in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def iresnet(state, x):
    def prelu(name, x):
        return torch.where(x > 0, x, x * state[f"{name}.weight"].reshape(-1, 1, 1))

    def conv(name, x, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def n(name, x):
        return norm(state, name, x, 1e-5)

    x = prelu("prelu", n("bn1", conv("conv1", x)))
    for level in range(1, 5):
        for i in itertools.count():
            block = f"layer{level}.{i}"
            if f"{block}.conv1.weight" not in state:
                break
            stride = 2 if i == 0 else 1
            out = prelu(f"{block}.prelu", n(f"{block}.bn2", conv(f"{block}.conv1", n(f"{block}.bn1", x))))
            out = n(f"{block}.bn3", conv(f"{block}.conv2", out, stride))
            x = out + (n(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, 2)) if i == 0 else x)
    x = n("bn2", x).reshape(len(x), 512 * 7 * 7)
    return n("features", x @ state["fc.weight"].T + state["fc.bias"])


def facenet(state, x):
    def conv(name, x, stride=1, same=False):
        weight = state[f"{name}.conv.weight"]
        padding = [k // 2 for k in weight.shape[-2:]] if same else 0
        return norm(state, f"{name}.bn", F.conv2d(x, weight, stride=stride, padding=padding), 1e-3).clamp(min=0)

    def chain(name, x, *last):
        for i in itertools.count():
            if f"{name}.{i + 1}.conv.weight" not in state:
                return conv(f"{name}.{i}", x, *(last or (1, True)))
            x = conv(f"{name}.{i}", x, same=True)

    def residual(name, x, scale):
        branches = [conv(f"{name}.branch0", x), chain(f"{name}.branch1", x)]
        branches += [chain(f"{name}.branch2", x)] if f"{name}.branch2.0.conv.weight" in state else []
        return x + scale * F.conv2d(
            torch.cat(branches, 1), state[f"{name}.conv2d.weight"], state[f"{name}.conv2d.bias"])

    x = conv("conv2d_2b", conv("conv2d_2a", conv("conv2d_1a", x, 2)), same=True)
    x = F.max_pool2d(x, 3, 2)
    x = conv("conv2d_4b", conv("conv2d_4a", conv("conv2d_3b", x)), 2)
    for i in range(5):
        x = residual(f"repeat_1.{i}", x, 0.17).relu()
    x = torch.cat([conv("mixed_6a.branch0", x, 2), chain("mixed_6a.branch1", x, 2), F.max_pool2d(x, 3, 2)], 1)
    for i in range(10):
        x = residual(f"repeat_2.{i}", x, 0.1).relu()
    x = torch.cat([*(chain(f"mixed_7a.branch{i}", x, 2) for i in range(3)), F.max_pool2d(x, 3, 2)], 1)
    for i in range(5):
        x = residual(f"repeat_3.{i}", x, 0.2).relu()
    x = residual("block8", x, 1.0).sum((2, 3)) / 9
    x = norm(state, "last_bn", x @ state["last_linear.weight"].T, 1e-3)
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("build, restated, size", [
    (lambda: IResNet(BLOCKS), iresnet, 112), (InceptionResnetV1, facenet, 160)], ids=["arcface", "facenet"])
def test_the_networks_are_their_definitions(build, restated, size, dtype, tolerance):
    module = network(build, dtype)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1
    got, wanted = module(x), restated(module.state_dict(), x)
    assert got.shape == (2, 512) and got.dtype == dtype
    assert (got[0] - got[1]).abs().max() > 0.02 * got.abs().max(), "the comparison says nothing"
    error = (got - wanted).abs().max() / wanted.abs().max()
    print(f"{error:.1e}", end=" ")
    assert error < tolerance


def with_norm(names: dict, name: str, width: int) -> None:
    names |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    names[f"{name}.num_batches_tracked"] = ()


@pytest.mark.parametrize("blocks, parameters", [(identity.IRESNET_50, 43_590_848), (identity.IRESNET_100, 65_156_160)])
def test_iresnets_names_and_shapes(blocks, parameters):
    """insightface's, as CVLface's file has them inside `model.net.`."""
    names = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), "fc.weight": (512, 25088), "fc.bias": (512,)}
    for name, width in (("bn1", 64), ("bn2", 512), ("features", 512)):
        with_norm(names, name, width)
    width = 64
    for level, (n, wider) in enumerate(zip(blocks, (64, 128, 256, 512)), 1):
        names[f"layer{level}.0.downsample.0.weight"] = (wider, width, 1, 1)
        with_norm(names, f"layer{level}.0.downsample.1", wider)
        for i in range(n):
            block = f"layer{level}.{i}"
            names |= {f"{block}.conv1.weight": (wider, width, 3, 3), f"{block}.conv2.weight": (wider, wider, 3, 3)}
            names[f"{block}.prelu.weight"] = (wider,)
            for name, w in (("bn1", width), ("bn2", wider), ("bn3", wider)):
                with_norm(names, f"{block}.{name}", w)
            width = wider
    module = on_meta(lambda: IResNet(blocks))
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == names
    assert sum(x.numel() for x in module.parameters()) == parameters             # of 100: 261 MB, as the Hub has it


def test_facenet_fills_the_published_file_to_the_byte():
    """py-feat/facenet's model.safetensors has 111,831,500 bytes, classifier and all: every name's length and every
    shape count in them."""
    module = on_meta(InceptionResnetV1)
    module.logits = on_meta(lambda: torch.nn.Linear(512, 8631))
    state, header, end = module.state_dict(), {}, 0
    assert {tuple(state[name].shape) for name in (
        "conv2d_1a.conv.weight", "repeat_2.9.branch1.1.conv.weight", "mixed_7a.branch2.2.bn.running_var",
        "block8.conv2d.bias", "last_bn.num_batches_tracked")} == {(32, 3, 3, 3), (128, 128, 1, 7), (256,), (1792,), ()}
    for name in sorted(state, key=lambda name: (state[name].is_floating_point(), name)):
        start, end = end, end + state[name].nbytes
        header[name] = {"dtype": "F32" if state[name].is_floating_point() else "I64", "shape": [*state[name].shape],
                        "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + length + -length % 8 + end == 111_831_500


# Files

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """As published: ArcFace's in two wrappers, FaceNet's with its classifier; ArcFace with few blocks."""
    folder = tmp_path_factory.mktemp("identity")
    arcface = random_state(on_meta(lambda: IResNet(BLOCKS)))
    (folder / "arcface").mkdir()
    save_file({f"model.net.{name}": x for name, x in arcface.items()}, folder / "arcface" / "model.safetensors")
    logits = {"logits.weight": torch.zeros(9, 512), "logits.bias": torch.zeros(9)}
    torch.save(random_state(on_meta(InceptionResnetV1)) | logits, folder / "facenet.pth")
    return folder


@pytest.fixture(scope="module")
def distances(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "IRESNET_50", BLOCKS)
        return {"arcface": load_identity(files / "arcface"), "facenet": load_identity(files / "facenet.pth")}


def test_what_a_file_holds_is_known_by_its_tensors(distances, files):
    assert isinstance(distances["arcface"], ArcFace) and isinstance(distances["facenet"], FaceNet)
    for name, build in (("arcface", lambda: IResNet(BLOCKS)), ("facenet", InceptionResnetV1)):
        wanted, got = network(build).state_dict(), distances[name].network.state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in got)
        assert not distances[name].network.training


@pytest.mark.parametrize("name", ["arcface", "facenet"])
def test_distances(distances, name):
    """The formula, on average over the concept's pictures; each picture on its own; 0 from itself."""
    distance, size = distances[name], {"arcface": 112, "facenet": 160}[name]
    pictures, concept = faces(2, size), faces(2, size, seed=1)
    apart = distance(pictures, concept)
    assert apart.shape == (2,) and apart.dtype == torch.float32 and apart.device.type == "cpu"

    half_range = {"arcface": 127.5, "facenet": 128}[name]
    rows = [torch.from_numpy((np.array(image) - 127.5) / half_range).permute(2, 0, 1) for image in pictures + concept]
    a, b = distance.network(torch.stack(rows).float()).double().split(2)
    if name == "arcface":
        wanted = 1 - F.cosine_similarity(a[:, None], b[None], dim=2)
    else:
        wanted = (a[:, None] - b[None]).norm(dim=2)
    assert wanted.std() > 1e-3, "the comparison says nothing"
    torch.testing.assert_close(apart, wanted.mean(1).float(), rtol=1e-4, atol=1e-6)
    alone = torch.cat([distance([picture], concept[::-1]) for picture in pictures])
    torch.testing.assert_close(alone, apart, rtol=1e-4, atol=1e-6)
    assert distance(pictures[:1], pictures[:1]).item() == 0
    grey = concept[0].convert("L")
    torch.testing.assert_close(distance([grey], concept), distance([grey.convert("RGB")], concept))


def test_names_lead_to_the_hub(monkeypatch, tmp_path):
    asked = []
    save_file({"conv2d_1a.conv.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(identity, "find_file", lambda *source: asked.append(source) or tmp_path / "x.safetensors")
    monkeypatch.setattr(identity, "load_weights", lambda build, tensors, where, *there: there)
    for name, source in (("arcface", "minchul/cvlface_arcface_ir101_webface4m"),
                         ("facenet", "py-feat/facenet@8dd79278b755ee24ee9922619122df8a2b80b787"),
                         ("some/body", "some/body")):
        assert load_identity(name, "cuda").network == ("cuda", torch.float32)    # and never in half precision
        assert asked.pop()[:2] == (source, "model.safetensors")


def refused(match: str, call, *arguments) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


WRONG = {
    "AdaFace's": ({"model.net.input_layer.0.weight": (64, 3, 3, 3)}, "an IR network such as AdaFace's, and no ArcFace"),
    "another depth": (
        {f"layer{n}.{i}.conv1.weight": (1,) for n in range(1, 5) for i in range(2)},
        r"a ResNet of \(2, 2, 2, 2\) blocks, and no ArcFace"),
    "a LoRA": ({"lora_unet_down_blocks_0.lora_up.weight": (4, 4)}, "a LoRA, and no ArcFace"),
    "anything": ({"x": (1,)}, r"1 tensors, the first 'x'\), and no ArcFace .iResNet-50 or -100. and no FaceNet"),
    "FaceNet's, cut": (
        {"conv2d_1a.conv.weight": (32, 3, 3, 3)}, "714 tensors expected; missing: 713 .* unexpected: 0"),
    "FaceNet's, another": (
        {"conv2d_1a.conv.weight": (32, 3, 3, 3), "extra": (1,)}, "unexpected: 1 .extra.")}


@pytest.mark.parametrize("tensors, match", WRONG.values(), ids=WRONG)
def test_another_file_is_refused_by_what_it_is(tensors, match, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        refused(rf"^{tmp_path}/model.safetensors: .*{match}", load_identity, source)


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "w600k_r50.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "page.safetensors").write_text("<html>")
    refused("an ONNX graph, which is not read here; the Hub has", load_identity, tmp_path / "w600k_r50.onnx")
    refused("a web page", load_identity, tmp_path / "page.safetensors")
    refused("no model.safetensors or", load_identity, tmp_path)
    refused("vggface: no such file .* one of arcface, facenet, paper-people", load_identity, "vggface")
    refused("no such file", load_identity, "some/model.safetensors")
    monkeypatch.setattr(identity, "IRESNET_50", BLOCKS)
    wrong = random_state(on_meta(lambda: IResNet(BLOCKS))) | {"fc.weight": torch.zeros(512, 9)}
    save_file(wrong, tmp_path / "shape.safetensors")
    refused(r"fc.weight is \(512, 9\), expected \(512, 25088\)", load_identity, tmp_path / "shape.safetensors")


def test_pictures_that_are_no_faces_are_refused(distances):
    good, whole = faces(1, 112), Image.new("RGB", (640, 480))
    no_face = "picture 2 of 2 is 640x480, no face of 112x112; there is no face detector here.*align.*five landmarks"
    refused(f"^{no_face}", distances["arcface"], [*good, whole], good)
    refused(f"^concept {no_face}", distances["arcface"], good, [*good, whole])
    refused("112x112, no face of 160x160", distances["facenet"], good, good)
    refused("no concept picture to compare", distances["arcface"], good, [])
    refused("no picture to compare", distances["arcface"], [], good)


# Alignment

def umeyama(points, targets):
    """By the singular value decomposition, as the paper has it -> (2, 3)."""
    mean, target = points.mean(0), targets.mean(0)
    u, s, vt = np.linalg.svd((targets - target).T @ (points - mean) / len(points))
    sign = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (s * sign).sum() / (points - mean).var(0).sum()
    return np.column_stack([scale * rotation, target - scale * rotation @ mean])


def lstsq(points, targets):
    """The four unknowns of a similarity as a linear system -> (2, 3)."""
    x, y = points.T
    rows = np.concatenate([np.stack([x, -y, 1 + 0 * x, 0 * x], 1), np.stack([y, x, 0 * x, 1 + 0 * x], 1)])
    (a, b, tx, ty), *_ = np.linalg.lstsq(rows, targets.T.reshape(-1), rcond=None)
    return np.array([[a, -b, tx], [b, a, ty]])


def complex_of(points):
    return points[:, 0] + 1j * points[:, 1]


@pytest.mark.parametrize("seed", range(5))
def test_similarity_is_umeyamas_least_squares(seed):
    rng = np.random.default_rng(seed)
    points = TEMPLATE @ rng.normal(size=(2, 2)) * 3 + rng.normal(0, 4, TEMPLATE.shape)          # sheared, or mirrored
    a, b = similarity(complex_of(points), complex_of(TEMPLATE))
    got = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    np.testing.assert_allclose(got, lstsq(points, TEMPLATE), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(got, umeyama(points, TEMPLATE), rtol=1e-8, atol=1e-8)


def pattern(x, y):
    """A smooth picture of the plane."""
    return 128 + 100 * np.stack([np.sin(x / 9) * np.cos(y / 14), np.cos((x + y) / 11), np.sin(y / 8)], -1)


@pytest.mark.parametrize("size", [112, 160])
@pytest.mark.parametrize("scale, angle, shift", [
    (1, 0, 0), (2.3, 35, 90 + 40j), (0.9, -120, 150 + 200j), (4, 180, 480 + 470j)])
def test_a_known_rotation_scale_and_shift_is_undone(scale, angle, shift, size):
    """A face that was scaled, turned and shifted comes back, upright and in its place."""
    turn = scale * np.exp(1j * np.deg2rad(angle))
    landmarks = turn * complex_of(TEMPLATE) + shift
    y, x = np.mgrid[:520, :560]
    face = (x + 1j * y - shift) / turn                         # where each pixel lies in the face of 112 x 112
    image = Image.fromarray(pattern(face.real, face.imag).round().astype(np.uint8))
    got = np.array(align(image, np.stack([landmarks.real, landmarks.imag], 1), size)).astype(float)
    y, x = np.mgrid[:size, :size] * 112 / size
    source = turn * (x + 1j * y) + shift
    inside = (source.real >= 0) & (source.real <= 559) & (source.imag >= 0) & (source.imag <= 519)
    assert got.shape == (size, size, 3) and inside.mean() > 0.3
    worst = np.abs(got - pattern(x, y))[inside].max()
    print(f"{worst:.1f}", end=" ")
    assert worst < (1 if scale == 1 and size == 112 else 3)    # of 255: rounding twice, and the bilinear's
    beyond = (source.real < -1) | (source.real > 560) | (source.imag < -1) | (source.imag > 520)
    assert not got[beyond].any()                               # black


def test_a_face_in_its_place_stays_and_the_border_fades_to_black():
    image = faces(1, 112)[0]
    assert align(image, TEMPLATE).tobytes() == image.tobytes()
    assert align(image.convert("RGBA"), TEMPLATE.tolist()).mode == "RGB"
    white = np.array(align(Image.new("RGB", (112, 112), "white"), TEMPLATE + (10.25, 0)))[..., 0]
    assert (white[:, :101] == 255).all() and (white[:, 101] == round(0.75 * 255)).all() and not white[:, 102:].any()


@pytest.mark.parametrize("landmarks", [
    None, [], TEMPLATE[:4], [(1, 2, 3)] * 5, [(3, 4)] * 5, [(1, 2)] * 4 + [(1, float("nan"))], "eyes",
    [(1, 2)] * 4 + [(1, 10**400)], [(1, 2)] * 4 + [(1e300, 2)], [[1], [2, 3]]])
def test_landmarks_that_are_none_are_refused(landmarks):
    refused("five points .x, y. expected", align, Image.new("RGB", (200, 200)), landmarks)


# The paper people

@pytest.fixture(scope="module")
def rendered():
    return people.rendered(24, seed=1)


@pytest.fixture(scope="module")
def judge():
    return people.load_judge(people.CHECKPOINT / "judge")


def test_the_built_in_model_names_its_own():
    assert all(model.identity for model in BUILT_IN.values())
    person = {"skin": world.SKIN[0], "hair": "red", "build": "woman"}
    shown = world.Person("man", "black", "red", "blue", "sitting", "room")
    one = people.picture_of(person, shown, random.Random(0))
    distance = load_identity("paper-people")
    assert distance([one], [one]).tolist() == [0]
    rng = random.Random(1)
    others = [person] + [{**person, **change} for change in (
        {"skin": world.SKIN[2]}, {"hair": "black"}, {"build": "man"}, {"hair": "black", "build": "man"})]
    pictures = [people.picture_of(other, people.elsewhere(shown, rng), rng) for other in others]
    apart = distance(pictures, [one, one])
    assert apart.shape == (5,) and apart.dtype == torch.float32
    torch.testing.assert_close(apart, torch.tensor([0, 1, 1, 1, 2]) / 3, rtol=0, atol=0.06)
    torch.testing.assert_close(distance(pictures[::-1], [one]), apart.flip(0))
    mean = (distance(pictures, pictures[:1]) + distance(pictures, pictures[1:2])) / 2
    torch.testing.assert_close(distance(pictures, pictures[:2]), mean)
    refused("no picture to compare", distance, [], [one])


def test_a_person_is_nearer_elsewhere_than_another_one(judge, rendered):
    found = people.separation(judge, rendered)
    assert list(found) == ["anything", "skin", "hair", "build"] and min(found.values()) > 0.99, found


def test_skin_is_seen_in_every_pose_and_place():
    """As a tone: 0, 0.5, 1. And where there is no face, nothing is said of it."""
    rng, tones, wanted, sitting = random.Random(3), [], [], []
    for k, (pose, place, skin) in enumerate(itertools.product(world.POSES, world.PLACES, world.SKIN)):
        shown = world.Person("man", "black", "red", "blue", pose, place)
        person = {"skin": skin, "hair": list(world.HAIR)[k % 4], "build": world.WHO[k % 2]}
        tones.append(np.asarray(people.picture_of(person, shown, rng)))
        wanted.append(world.SKIN.index(skin) / 2)
        sitting.append(pose == "sitting")
    got = people.tone_of(people.data.to_tensor(np.stack(tones)), torch.tensor(sitting))
    assert (got - torch.tensor(wanted)).abs().max() < 0.2, "nearly as near to another skin"
    assert people.tone_of(torch.zeros(1, 3, 64, 64) + torch.tensor([-1.0, -1, 1])[:, None, None],
                          torch.tensor([False])).item() == pytest.approx(0.5, abs=1e-3)


def test_others_differ_in_what_they_are_said_to():
    rng = random.Random(0)
    for name in ("anything", *people.PARTS):
        for _ in range(20):
            person = people.person_at_random(rng)
            other = people.another(person, name, rng)
            different = [part for part in people.PARTS if person[part] != other[part]]
            assert different == [name] if name in people.PARTS else different and other.keys() == person.keys()


def test_auc():
    assert people.auc(torch.tensor([0.0, 1.0]), torch.tensor([2.0])) == 1
    assert people.auc(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])) == (0.5 + 1 + 0 + 0) / 4


def test_the_command_states_it(program, capsys):
    assert program(people, "--count", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 people") and [line[:22].strip() for line in lines[1:]] == [
        "as rendered", "through the VAE", "the same, with noise"]
    assert all(line.count(", ") - line[:22].count(", ") == 3 for line in lines[1:])
