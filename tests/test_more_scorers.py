"""The scorers beside PickScore: their networks against transformers', their preprocessing against values worked out
here, their files as the real ones are named, and score.py from outside."""

import itertools
import json
import re
import sys
import warnings

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

import cli
import score
from model.clip import CLIP
from model.errors import UserError
from model.files import digest_all, files_read
from model.image_reward import ImageRewardNetwork, WordPiece, load_image_reward
from model.open_clip import from_open_clip
from model.preprocess import MEAN, STD, clip_preprocess, letterbox, openai_preprocess
from model.reward_head import RewardHead
from model.scorers import (
    SCORERS,
    VIT_H,
    ScorerEntry,
    digest_of_scorer,
    has_image_tower,
    load_aesthetic,
    load_hps,
    load_scorer,
    parse_sum,
)
from model.tokenizer import Tokenizer

PROMPTS = ["a cat with two horns", "a woman waving on a beach", "a cat with two horns"]
# Unequal towers, and a vision head of 10 that is not the text's 8, as ViT-H has 80 and 64.
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_act="gelu")
VISION = dict(
    hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, hidden_act="gelu",
    image_size=28, patch_size=14)


def random_state(module, seed=0, dtype=torch.float64):
    """A value for every parameter, norms and biases too; they keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5
        state[name] = (1 + noise if tensor.ndim == 1 and name.endswith("weight") else noise).to(dtype)
    return state


def picture(width, height, seed=0):
    """Smooth shapes with an edge, so that a resize that differs shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * (0.05 + 0.03 * c) + seed) * np.cos(y * 0.07 - c) for c in range(3)]
    pixels = (127 + 90 * np.stack(waves, -1) + 30 * (x > width // 3)[..., None]).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


IMAGES = [picture(70, 40), picture(33, 64, 1), picture(28, 28, 2)]


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


# HPS

def to_open_clip(state):
    """transformers' CLIP names -> open_clip's, written from open_clip's model: the other way round than the loader."""
    names = {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding"}
    norms = {
        "vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final"}
    names |= {f"{a}.{w}": f"{b}.{w}" for (a, b), w in itertools.product(norms.items(), ("weight", "bias"))}
    out = {names[name]: tensor for name, tensor in state.items() if name in names}
    out["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    out["text_projection"] = state["text_projection.weight"].T.contiguous()
    parts = {
        "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj"}
    for tower, block in (("vision_model", "visual.transformer.resblocks"), ("text_model", "transformer.resblocks")):
        for n in range(sum(name.startswith(tower) and name.endswith("layer_norm1.bias") for name in state)):
            layer = f"{tower}.encoder.layers.{n}"
            for w in ("weight", "bias"):
                qkv = [state[f"{layer}.self_attn.{letter}_proj.{w}"] for letter in "qkv"]
                out[f"{block}.{n}.attn.in_proj_{w}"] = torch.cat(qkv)
                out |= {f"{block}.{n}.{b}.{w}": state[f"{layer}.{a}.{w}"] for a, b in parts.items()}
    return out


@pytest.fixture(scope="module")
def clip_oracle():
    """transformers' CLIPModel, tiny, random, in float64."""
    special = dict(eos_token_id=49407, bos_token_id=49406, pad_token_id=49407)
    config = CLIPConfig(text_config=TEXT | special, vision_config=VISION, projection_dim=24)
    model = CLIPModel(config)
    model.load_state_dict(random_state(model))
    return model.double().eval()


@torch.no_grad()
def oracle_cosines(model, pixels, prompts):
    ids = Tokenizer.clip().encode(prompts)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    return (out.text_embeds * out.image_embeds).sum(-1)


ARGUMENTS = {"text": TEXT, "vision": VISION, "projection_dim": 24}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("form", ["state_dict in .pt", "module. in .pt", "model. in .safetensors", "transformers'"])
def test_hps_is_the_cosine_of_the_open_clip_model(clip_oracle, tmp_path, form, dtype, tolerance):
    state = clip_oracle.state_dict() if form == "transformers'" else to_open_clip(clip_oracle.state_dict())
    path = tmp_path / ("HPS_v2_compressed.pt" if form.endswith(".pt") else "model.safetensors")
    prefix = re.match(r"(\w+\.)?", form)[0]
    state = {prefix + name: tensor for name, tensor in state.items()}
    if form == "state_dict in .pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form.endswith(".pt"):
        torch.save(state, path)
    else:
        save_file(state, path)
    scorer = load_hps("hpsv2", False, str(tmp_path), "cpu", dtype, ARGUMENTS)
    got = scorer(IMAGES, PROMPTS)
    pixels = torch.stack([letterbox(image, 28) for image in IMAGES]).to(torch.float64)
    wanted = oracle_cosines(clip_oracle, pixels, PROMPTS)
    assert got.dtype == torch.float32 and wanted.std() > 0.01
    # The result is rounded to float32; the network before it is not.
    torch.testing.assert_close(got, wanted.float(), rtol=0, atol=max(tolerance * wanted.abs().max().item(), 6e-8))
    embedded = scorer.clip.embed_images(pixels.to(dtype))
    theirs = F.normalize(clip_oracle.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    assert (embedded - theirs).abs().max() < tolerance


def test_vit_h_has_open_clips_keys():
    def block(name, n, width, hidden):
        b = f"{name}.resblocks.{n}."
        return {
            b + "ln_1.weight": (width,), b + "ln_1.bias": (width,), b + "attn.in_proj_weight": (3 * width, width),
            b + "attn.in_proj_bias": (3 * width,), b + "attn.out_proj.weight": (width, width),
            b + "attn.out_proj.bias": (width,), b + "ln_2.weight": (width,), b + "ln_2.bias": (width,),
            b + "mlp.c_fc.weight": (hidden, width), b + "mlp.c_fc.bias": (hidden,),
            b + "mlp.c_proj.weight": (width, hidden), b + "mlp.c_proj.bias": (width,)}

    keys = {
        "positional_embedding": (77, 1024), "text_projection": (1024, 1024), "logit_scale": (),
        "visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280), "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14), "visual.ln_pre.weight": (1280,), "visual.ln_pre.bias": (1280,),
        "visual.ln_post.weight": (1280,), "visual.ln_post.bias": (1280,), "token_embedding.weight": (49408, 1024),
        "ln_final.weight": (1024,), "ln_final.bias": (1024,)}
    for n in range(32):
        keys |= block("visual.transformer", n, 1280, 5120)
    for n in range(24):
        keys |= block("transformer", n, 1024, 4096)
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in from_open_clip(theirs).items()}
    assert ours == shapes(on_meta(lambda: CLIP(**VIT_H)))
    # The published file, in half precision, less some hundred bytes a tensor of zip and pickle.
    size = 2 * sum(tensor.numel() for tensor in theirs.values())
    assert 0 < 1_972_484_501 - size < 600 * len(theirs)


def test_names_choose_hps_version_source_and_antialias(monkeypatch, tmp_path):
    asked, file = [], tmp_path / "x.safetensors"
    save_file({}, file)
    monkeypatch.setattr("model.scorers.find_file", lambda source, name, *_: asked.append((source, name)) or file)
    monkeypatch.setattr("model.scorers.load_weights", lambda build, tensors, where, *there: there)
    for name, source, wanted, antialias in (
            ("hpsv2", "xswu/HPSv2", "HPS_v2_compressed.pt", False),
            ("hpsv2-antialias", "xswu/HPSv2", "HPS_v2_compressed.pt", True),
            ("hpsv2.1:my.pt", "my.pt", "HPS_v2.1_compressed.pt", False),
            ("hpsv2.1-antialias:owner/name", "owner/name", "HPS_v2.1_compressed.pt", True)):
        scorer = load_scorer(name, "cuda", torch.float16)
        assert asked.pop() == (source, wanted) and scorer.antialias == antialias
        assert scorer.clip == ("cuda", torch.float16) and scorer.image_size == 224


def test_hps_refuses_the_other_version_and_other_networks(tmp_path, clip_oracle):
    wrong = tmp_path / "HPS_v2_1.pt"
    with open(wrong, "wb") as file:
        file.truncate(1_972_484_501)           # v2's size, in a sparse file
    with pytest.raises(UserError, match=r"by its size this is hpsv2, not hpsv2.1.*HPS_v2.1_compressed.pt.*xswu/HPSv2"):
        load_scorer(f"hpsv2.1:{wrong}")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        load_scorer(f"hpsv2:{wrong}")
    save_file(to_open_clip(clip_oracle.state_dict()) | {"score_predictor.0.weight": torch.zeros(1)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="unexpected: 1 .score_predictor.0.weight."):
        load_hps("hpsv2", False, str(tmp_path / "x.safetensors"), "cpu", torch.float32, ARGUMENTS)


# Preprocessing

def normalised(value):
    return (value - torch.tensor(MEAN)) / torch.tensor(STD)


def test_letterbox_by_hand():
    black = normalised(torch.zeros(3))
    # A portrait of 704 x 1024: 154 x 224 between two bars of 35 columns, black before mean and std.
    tall = letterbox(Image.new("RGB", (704, 1024), (255, 51, 0)))
    assert tall.shape == (3, 224, 224)
    for columns, value in ((slice(0, 35), black), (slice(35, 189), normalised(torch.tensor([1, 0.2, 0]))),
                           (slice(189, 224), black)):
        torch.testing.assert_close(tall[:, :, columns], value[:, None, None].expand_as(tall[:, :, columns]))
    # An odd bar is thicker below; and a picture of the right length, not resized, gets its bars all the same.
    image = picture(224, 99)
    wide = letterbox(image)
    assert wide.shape == (3, 224, 224)
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(wide[:, 62:161], (exact - torch.tensor(MEAN)[:, None, None])
                               / torch.tensor(STD)[:, None, None])
    assert torch.equal(wide[:, :62], black[:, None, None].expand(3, 62, 224))
    assert torch.equal(wide[:, 161:], black[:, None, None].expand(3, 63, 224))


def test_letterbox_resamples_as_torchvision_did_and_does():
    # Cubic convolution with a = -0.75 half-way between pixels: the weights are -3/32, 19/32, 19/32, -3/32. Halving
    # without antialias reads just these four; a step from 0 to 1 overshoots, and is not cut off.
    row = np.array([0, 0, 0, 0, 255, 255, 255, 255], dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.tile(row, (8, 1))[..., None], 3, axis=-1))
    plain = letterbox(image, 4)[:, 0]
    wanted = torch.tensor([0, -3 / 32, 1 + 3 / 32, 1])
    torch.testing.assert_close(plain, (wanted - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None])
    image = picture(300, 200)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    for antialias in (False, True):
        resized = F.interpolate(pixels, (149, 224), mode="bicubic", align_corners=False, antialias=antialias)[0]
        wanted = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(letterbox(image, antialias=antialias)[:, 37:186], wanted)
    assert (letterbox(image) - letterbox(image, antialias=True)).abs().max() > 0.02


def test_image_rewards_preprocessing_differs_from_clips_where_the_references_do():
    assert torch.equal(openai_preprocess(picture(500, 448)), clip_preprocess(picture(500, 448), {}))     # 250: 13
    # 3 columns too many, from 454 at 448: the cut begins at 1.5, rounded to even, so 2; clip_preprocess floors to 1.
    rounded, floored = openai_preprocess(picture(454, 448)), clip_preprocess(picture(454, 448), {})
    assert torch.equal(rounded[:, :, :-1], floored[:, :, 1:]) and not torch.equal(rounded, floored)
    # Colours half transparent: resized with their alpha, not after it is dropped.
    image = picture(448, 448).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.repeat([255, 0], 7).astype(np.uint8), (448, 32))))
    by_hand = image.resize((224, 224), Image.Resampling.BICUBIC).convert("RGB")
    assert torch.equal(openai_preprocess(image), clip_preprocess(by_hand, {}))
    assert not torch.equal(openai_preprocess(image), clip_preprocess(image, {}))


# ImageReward

SMALL_VISION = dict(image_size=32, patch_size=8, dim=48, layers=3, heads=4)
SMALL_TEXT = dict(vocab_size=40, positions=37, dim=24, layers=2, heads=3, dim_hidden=40, dim_image=48)


def small_network():
    return ImageRewardNetwork(SMALL_VISION, SMALL_TEXT)


@pytest.fixture(scope="module")
def reward_state():
    return random_state(on_meta(small_network))


@pytest.fixture(scope="module")
def blip_oracles(reward_state):
    """transformers' two towers with the same weights, in float64."""
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        hidden_act="gelu", layer_norm_eps=1e-6)).double()
    names = {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding", "norm.": "post_layernorm.", "blocks": "encoder.layers",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection"}
    state = {}
    for name, tensor in reward_state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for ours, theirs in names.items():
                name = name.replace(ours, theirs) if ours != "norm." or name.startswith("norm.") else name
            state[name] = tensor
    vision.load_state_dict(state)
    # is_decoder gives it the cross-attention; the call then asks for no causal mask, as ImageReward does.
    text = BlipTextModel(BlipTextConfig(
        vocab_size=40, hidden_size=24, encoder_hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=37, hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True,
        pad_token_id=0, attn_implementation="eager", bos_token_id=38, sep_token_id=3), add_pooling_layer=False).double()
    prefix = "blip.text_encoder."
    text.load_state_dict({k.removeprefix(prefix): v for k, v in reward_state.items() if k.startswith(prefix)})
    return vision.eval(), text.eval()


@torch.no_grad()
def oracle_rewards(oracles, state, pixels, ids, mask):
    vision, text = oracles
    seen = vision(pixel_values=pixels).last_hidden_state
    read = text(input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=seen, is_decoder=False)
    x = read.last_hidden_state[:, 0]
    for n in (0, 2, 4, 6, 7):
        x = x @ state[f"mlp.layers.{n}.weight"].T + state[f"mlp.layers.{n}.bias"]
    return seen, read.last_hidden_state, x[:, 0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_blip_is_transformers_blip(reward_state, blip_oracles, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    ids = torch.randint(40, (3, 35), generator=generator)
    mask = torch.arange(35) < torch.tensor([35, 2, 20])[:, None]
    network = on_meta(small_network)
    network.load_state_dict({k: v.to(dtype) for k, v in reward_state.items()}, assign=True)
    network.eval()
    with torch.no_grad():
        seen = network.blip.visual_encoder(pixels.to(dtype))
        got = seen, network.blip.text_encoder(ids, mask, seen), network(pixels.to(dtype), ids, mask)
    for ours, theirs in zip(got, oracle_rewards(blip_oracles, reward_state, pixels, ids, mask), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_image_reward_has_the_checkpoints_keys():
    def linear(name, d_in, d_out):
        return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}

    def norm(name, d):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    keys = {
        v + "cls_token": (1, 1, 1024), v + "pos_embed": (1, 197, 1024), **norm(v + "norm", 1024),
        v + "patch_embed.proj.weight": (1024, 3, 16, 16), v + "patch_embed.proj.bias": (1024,),
        t + "embeddings.word_embeddings.weight": (30524, 768), t + "embeddings.position_embeddings.weight": (512, 768),
        **norm(t + "embeddings.LayerNorm", 768)}
    for n in range(24):
        b = f"{v}blocks.{n}."
        keys |= norm(b + "norm1", 1024) | norm(b + "norm2", 1024)
        keys |= linear(b + "attn.qkv", 1024, 3072) | linear(b + "attn.proj", 1024, 1024)
        keys |= linear(b + "mlp.fc1", 1024, 4096) | linear(b + "mlp.fc2", 4096, 1024)
    for n in range(12):
        b = f"{t}encoder.layer.{n}."
        for part, width in (("attention", 768), ("crossattention", 1024)):
            keys |= linear(f"{b}{part}.self.query", 768, 768)
            keys |= linear(f"{b}{part}.self.key", width, 768) | linear(f"{b}{part}.self.value", width, 768)
            keys |= linear(f"{b}{part}.output.dense", 768, 768) | norm(f"{b}{part}.output.LayerNorm", 768)
        keys |= linear(b + "intermediate.dense", 768, 3072) | linear(b + "output.dense", 3072, 768)
        keys |= norm(b + "output.LayerNorm", 768)
    for n, (d_in, d_out) in zip((0, 2, 4, 6, 7), ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        keys |= linear(f"mlp.layers.{n}", d_in, d_out)
    network = on_meta(ImageRewardNetwork)
    assert shapes(network) == keys
    unused = 1024 * 256 + 256 + 768 * 256 + 256 + 2 * 512                        # two projections; 512 int64 positions
    size = 4 * (sum(tensor.numel() for tensor in network.state_dict().values()) + unused)
    assert round(size / 1e9, 2) == 1.79                                          # the published file's gigabytes


WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "with", "two", "horn", "woman", "wav", "##ing",
    "on", "the", "beach", ",", "'", "cafe", "猫", "1", "##2", "b", "##each", "un", "##wav", "-", "!", "e", "##e", "[",
    "]", "enc", "##h", "x", "y", "z"]
TEXTS = [
    "A cat with two horns, on the beach!", "", "   ", "CAFÉ unwaving\tbeach\u00a0on\nthe beach's",
    "a猫cat 12 1 2 zebra", "[SEP] a [ENC] cat [DEC] [MASK] [enc]", "cat-cat--cat\x00\x07\u200bcat \ufffd", "x" * 101,
    "x y " * 40, "İe\u0301 ﬀ ½"]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, reward_state):
    """ImageReward.pt as published, but small: with what the score does not use."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    extra = {"blip.text_encoder.embeddings.position_ids": torch.arange(37)[None]}
    for name in ("vision_proj", "text_proj"):
        extra |= {f"blip.{name}.weight": torch.zeros(256, 5), f"blip.{name}.bias": torch.zeros(256)}
    torch.save(reward_state | extra, folder / "ImageReward.pt")
    return folder


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_word_pieces_are_transformers_bert_tokens(reward_folder, tmp_path, form):
    theirs = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    path = reward_folder / form
    if form == "tokenizer.json":
        # Before the two tokens are added, as on the Hub; a truncation and a padding are saved with it.
        theirs("a cat on the beach", padding="max_length", truncation=True, max_length=4)
        theirs.save_pretrained(tmp_path)
        assert json.loads((tmp_path / form).read_text(encoding="utf-8"))["truncation"]
        path = tmp_path / form
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    assert theirs.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [38, 39]
    wanted = theirs(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    ids, mask = WordPiece(path).encode(TEXTS)
    assert torch.equal(ids, wanted.input_ids) and torch.equal(mask.long(), wanted.attention_mask)
    assert ids[5].tolist()[:6] == [2, 3, 5, 39, 6, 38] and mask[8].all() and ids[8, -1] == 3


def test_word_pieces_that_are_cut_by_other_rules_are_refused(reward_folder, tmp_path):
    """A stranger's regular expression may never end."""
    core = WordPiece(reward_folder / "vocab.txt").core
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "removed")
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot be read as BERT's words .it cuts texts up in another way"):
        WordPiece(tmp_path / "tokenizer.json")


def test_image_reward_end_to_end(reward_folder, reward_state, blip_oracles, tmp_path):
    scorer = load_image_reward(str(reward_folder), "cpu", torch.float32, small_network)
    pixels = torch.stack([openai_preprocess(image, 32) for image in IMAGES]).double()
    ids, mask = WordPiece(reward_folder / "vocab.txt").encode(PROMPTS)
    raw = oracle_rewards(blip_oracles, reward_state, pixels, ids, mask)[2]
    wanted = (raw - 0.16717362830052426) / 1.0333394966054072
    got = scorer(IMAGES, PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(set(got.tolist())) == 3
    with pytest.raises(UserError, match="3 pictures and 1 prompts"):
        scorer(IMAGES, PROMPTS[:1])
    torch.save(reward_state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"39 words with \[DEC\] and \[ENC\], and the network has 40"):
        load_image_reward(str(tmp_path), "cpu", torch.float32, small_network)
    (tmp_path / "vocab.txt").write_text("<html>")
    with pytest.raises(UserError, match=r"no \[CLS\] in it"):
        load_image_reward(str(tmp_path), "cpu", torch.float32, small_network)


# CLIP score, aesthetic, one's own, sums

@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer_folder):
    """A CLIP's folder as transformers writes it, in its projection as wide as ViT-L/14, 28 pixels."""
    folder = tmp_path_factory.mktemp("clip")
    special = dict(eos_token_id=49407, bos_token_id=49406, pad_token_id=49407)
    towers = dict(text_config=TEXT | special, vision_config=VISION | {"hidden_act": "quick_gelu"})
    model = CLIPModel(CLIPConfig(**towers, projection_dim=768))
    model.load_state_dict(random_state(model, 5, torch.float32))
    model.save_pretrained(folder)
    Tokenizer.clip().save(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return folder, model.eval()


def test_clip_score_is_100_cosines(clip_folder):
    folder, model = clip_folder
    config = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = torch.stack([clip_preprocess(image, config) for image in IMAGES])
    wanted = oracle_cosines(model, pixels, PROMPTS)
    scorer = load_scorer(f"clip:{folder}")
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), 100 * wanted, rtol=0, atol=1e-4)
    assert scorer.formula == f"100 * cosine, {folder}"
    torch.testing.assert_close(load_scorer(folder)(IMAGES, PROMPTS), model.logit_scale.exp() * wanted)


@pytest.mark.parametrize("form", ["model.safetensors", "sac+logos+ava1-l14-linearMSE.pth"])
def test_aesthetic_is_an_affine_map_of_the_unit_vector(clip_folder, tmp_path, form):
    head = {}
    sizes = (768, 1024, 128, 64, 16, 1)
    generator = torch.Generator().manual_seed(3)
    for n, d_in, d_out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):                # LAION's file, key by key
        head[f"layers.{n}.weight"] = torch.randn(d_out, d_in, generator=generator) * d_in**-0.5
        head[f"layers.{n}.bias"] = torch.randn(d_out, generator=generator)
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == shapes(on_meta(RewardHead))
    if form.endswith(".pth"):
        torch.save(head, tmp_path / form)
    else:
        save_file(head, tmp_path / form)
    folder, model = clip_folder
    scorer = load_aesthetic(str(tmp_path), "cpu", torch.float32, str(folder))
    config = json.loads((folder / "preprocessor_config.json").read_text())
    with torch.no_grad():
        pixels = torch.stack([clip_preprocess(image, config) for image in IMAGES])
        x = model.get_image_features(pixel_values=pixels).pooler_output.double()
    x = (x / x.norm(dim=-1, keepdim=True)).numpy()
    for n in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{n}.weight"].double().numpy().T + head[f"layers.{n}.bias"].double().numpy()
    got = scorer(IMAGES, PROMPTS)
    np.testing.assert_allclose(got.numpy(), x[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(got, scorer(IMAGES, ["other", "words", "x"]))             # the prompt is ignored


OWN = '''
class Brightness:
    def __init__(self, device):
        self.device = device

    def __call__(self, images, prompts):
        grey = [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]
        return [value + len(prompt) for value, prompt in zip(grey, prompts)]

class Wrong(Brightness):
    def __call__(self, images, prompts):
        return [float("nan")] * len(images)
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own+1.py"
    path.write_text(OWN)
    return path


def own_file(tmp_path, name, text, **neighbours):
    for stem, content in neighbours.items():
        (tmp_path / f"{stem}.py").write_text(content)
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_ones_own_scorer_is_a_module_as_others_are(tmp_path):
    """A dataclass, a neighbour, a function; the files that it came from are known, each time it is loaded."""
    path = own_file(tmp_path, "mine.py", '''
from __future__ import annotations
from dataclasses import dataclass
import neighbour_of_mine

made = []

@dataclass
class Lengths:
    device: str

    def __post_init__(self):
        made.append(self.device)

    def __call__(self, images, prompts):
        return [neighbour_of_mine.length(prompt) + 10 * len(made) for prompt in prompts]

def lengths(images, prompts):
    return torch.tensor([neighbour_of_mine.length(prompt) for prompt in prompts])

import torch
NUMBER = 3
''', neighbour_of_mine="import neighbour_twice\nlength = neighbour_twice.length", neighbour_twice="length = len")
    (tmp_path / "not_imported.py").write_text("")
    for _ in range(2):
        with files_read() as read:
            by_class, by_function = load_scorer(f"{path}:Lengths", "cpu"), load_scorer(f"{path}:lengths")
        assert {file.name for file in read} == {"mine.py", "neighbour_of_mine.py", "neighbour_twice.py"}
    for _ in range(2):                         # its class is called once
        assert by_class(IMAGES, ["a", "", "abc"]).tolist() == [11, 10, 13]
    assert by_function(IMAGES, ["a", "", "abc"]).tolist() == [1, 0, 3]
    with pytest.raises(UserError, match="mine.py: no class and no function NUMBER in it"):
        load_scorer(f"{path}:NUMBER")
    assert "mine" not in sys.modules


def test_ones_own_scorer_that_cannot_be_loaded_is_one_line(tmp_path):
    for n, (text, neighbour, words) in enumerate((
            ("x = 1\ndef score(:\n", "", "own0.py:2: "), ("x = 1\n\nx.y\n", "", "own1.py:3: AttributeError: 'int'"),
            ("import sys\nsys.exit('a\\nb')\n", "", "own2.py:2: SystemExit: a b"),
            ("import nothing_of_this_name", "", "own3.py:1: ModuleNotFoundError: No module named 'nothing_of_this"),
            ("\nimport beside4", "x = (", "beside4.py:1: "),
            ("import beside5", "\n1 / 0", "beside5.py:2: ZeroDivisionError: division by zero"),
            ("import json\njson.loads('')", "", "own6.py:2: JSONDecodeError"), ("x = 1\n\0", "", "own7.py"))):
        path = own_file(tmp_path, f"own{n}.py", text, **{f"beside{n}": neighbour})
        with pytest.raises(UserError) as error:
            load_scorer(f"{path}:score")
        assert str(error.value).startswith(f"{tmp_path}/{words}") and "\n" not in str(error.value)
    path = own_file(tmp_path, "fails.py", "def score(images, prompts):\n    return 1 / 0\n"
                    "def words(images, prompts):\n    return 'good'\ndef none(images, prompts):\n    pass\n")
    with pytest.raises(ZeroDivisionError):     # this is for its author, with its traceback
        load_scorer(f"{path}:score")(IMAGES, PROMPTS)
    for name, shown in (("words", "'good'"), ("none", "None")):
        with pytest.raises(UserError, match=f"fails.py:{name}: 3 finite scores expected, got {shown}"):
            load_scorer(f"{path}:{name}")(IMAGES, PROMPTS)


def test_a_digest_tells_scorers_of_the_same_files_apart(tmp_path):
    """And is the contents' alone where there is nothing else: a folder may move."""
    (tmp_path / "own.py").write_text("")
    names = [f"{tmp_path}/own.py:A", f"{tmp_path}/own.py:B", "2*pickscore", "-1*pickscore", "pickscore", "hpsv2.1",
             "hpsv2.1-antialias", "pickscore+clip", "clip+pickscore"]
    assert len({digest_of_scorer(name, [tmp_path / "own.py"]) for name in names}) == len(names)
    folders = {digest_of_scorer(name, [tmp_path / "own.py"]) for name in ("a/folder", "owner/name", "pickscore:a")}
    assert folders == {digest_all([tmp_path / "own.py"])}


def test_ones_own_scorer_and_a_weighted_sum(own, clip_folder):
    images, prompts = [Image.new("RGB", (4, 4), (v, v, v)) for v in (10, 200)], ["ab", ""]
    bright = load_scorer(f"{own}:Brightness", "cpu")
    assert bright(images, prompts).tolist() == [12, 200] and bright(images, prompts).dtype == torch.float32
    plain = own.with_name("own.py")
    own.rename(plain)                          # a + in a name is read as itself, but not inside of a sum
    total = load_scorer(f"0.5*{plain}:Brightness + -2*clip:{clip_folder[0]}")(images, prompts)
    torch.testing.assert_close(
        total, torch.tensor([6, 100]) - 2 * load_scorer(f"clip:{clip_folder[0]}")(images, prompts))
    assert parse_sum("0.5*pickscore+2*imagereward+clip") == [(0.5, "pickscore"), (2, "imagereward"), (1, "clip")]
    for wrong in ("half*pickscore", "2*", "pickscore+", "inf*clip+clip"):
        with pytest.raises(UserError, match=re.escape(wrong) + ".*is no term of a sum"):
            load_scorer(wrong)
    for name, reason in ((f"{plain}:Nothing", "no class and no function Nothing in it"),
                         ("missing.py:Scorer", "missing.py: no such file"),
                         ("hpsv3", "hpsv3: no such file or folder, and no Hub id.* one of pickscore.*hpsv2.1")):
        with pytest.raises(UserError, match=reason):
            load_scorer(name)
    with pytest.raises(UserError, match=r"own.py:Wrong: 2 finite scores expected, got \[nan, nan\]"):
        load_scorer(f"{plain}:Wrong")(images, prompts)


def test_a_new_scorer_is_a_line(monkeypatch, run, folder):
    """In load_scorer, in a sum, in the list of names, and in score.py, which asks it for no prompts."""
    asked = []

    def load(source, device, dtype):
        asked.append((source, str(device), dtype))
        return lambda images, prompts: torch.tensor([len(source) + image.width for image in images]).float()

    name = "no such scorer"
    with pytest.raises(UserError) as before:
        load_scorer(name)
    monkeypatch.setitem(SCORERS, "width", ScorerEntry(load, "own/er", image_tower=True, reads_prompt=False))
    with pytest.raises(UserError) as after:
        load_scorer(name)
    assert str(after.value) == f"{before.value}, width"
    assert load_scorer("width", "cpu", torch.float64)(IMAGES, PROMPTS).tolist() == [76, 39, 34]
    assert load_scorer("2*width+-1*width:x")(IMAGES, PROMPTS).tolist() == [81, 44, 39]
    assert asked == [("own/er", "cpu", torch.float64), ("own/er", "cpu", torch.float32), ("x", "cpu", torch.float32)]
    assert has_image_tower("width") and has_image_tower("width:x")
    (folder / "images.jsonl").unlink()
    rows, stdout, _ = run("--scorers", "width,width:x")
    assert [row["scores"] for row in rows] == [{"width": 46 + n, "width:x": 41 + n} for n in range(6)]
    assert "width:x: mean 43.5000 of 6 pictures" in stdout


@pytest.mark.parametrize("name, words", [
    ("pickscore", "yuvalkirstain/PickScore_v1.*model.safetensors"), ("hpsv2", "xswu/HPSv2.*HPS_v2_compressed.pt"),
    ("hpsv2.1-antialias", "xswu/HPSv2.*HPS_v2.1_compressed.pt"), ("imagereward", "THUDM/ImageReward.*ImageReward.pt"),
    ("aesthetic", "ttj/sac-logos-ava1-l14-linearMSE.*model.safetensors"),
    ("clip", "openai/clip-vit-large-patch14.*model.safetensors")])
def test_missing_weights_are_named(name, words, monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=words) as error:
        load_scorer(name)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.pt: no such file"):
        load_scorer("imagereward:somewhere/nowhere.pt")


# score.py

@pytest.fixture
def folder(tmp_path):
    """Six pictures as generate.py leaves them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"file": f"{n:05d}.png", "prompt": f"picture {n % 4}", "seed": n} for n in range(6)]
    for n, row in enumerate(rows):
        picture(40 + n, 50, n).save(folder / row["file"])
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (30, 30)).save(folder / "sheet.png")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    def run(*args, code=0):
        """Calls the program as the command line does -> its rows, its stdout and stderr."""
        out = tmp_path / "scores.jsonl"
        argv = ["score.py", "--images", folder, "--device", "cpu", "--out", out, "--batch-size", 4, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)       # cli.run has its own
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as ended:
                cli.run(score.main)
            assert ended.value.code == code
        else:
            cli.run(score.main)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
        out.unlink(missing_ok=True)
        return rows, *capsys.readouterr()
    return run


def lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith("score.py: ")]


def test_score_program(run, folder, clip_folder, own):
    name, clip = f"{own}:Brightness", f"clip:{clip_folder[0]}"
    rows, stdout, _ = run("--scorers", f"{name},{clip}")
    assert [(row["file"], row["prompt"]) for row in rows] == [(f"{n:05d}.png", f"picture {n % 4}") for n in range(6)]
    images = [Image.open(folder / row["file"]) for row in rows]
    for key in (name, clip):
        wanted = load_scorer(key)(images, [row["prompt"] for row in rows])
        got = torch.tensor([row["scores"][key] for row in rows])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert f"{key}: mean {got.mean():.4f} of 6 pictures" in stdout
    assert f"{clip}: 100 * cosine, {clip_folder[0]}" in stdout


def test_score_program_takes_prompts_from_a_file_in_the_order_of_names(run, folder, own, tmp_path):
    (folder / "images.jsonl").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"line {n}\n" for n in range(6)))
    rows, *_ = run("--scorers", f"{own}:Brightness", "--prompts", prompts)
    assert [(row["file"], row["prompt"]) for row in rows] == [(f"{n:05d}.png", f"line {n}") for n in range(6)]
    prompts.write_text("only\nthree\nlines\n")
    rows, _, stderr = run("--scorers", f"{own}:Brightness", "--prompts", prompts, code=2)
    assert not rows and len(lines(stderr)) == 1 and re.search(r"6 pictures in .* and 3 prompts in .*", stderr)
    _, _, stderr = run("--scorers", f"{own}:Brightness", code=2)
    assert re.search("no images.jsonl here.*--prompts", lines(stderr)[0])


def test_score_program_names_what_is_bad_and_scores_the_rest(run, folder, own, monkeypatch):
    data = (folder / "00001.png").read_bytes()
    (folder / "00001.png").write_bytes(data[:len(data) // 2])
    rows, _, stderr = run("--scorers", f"{own}:Brightness", code=2)
    assert len(rows) == 5 and len(lines(stderr)) == 1 and "00001.png" in stderr
    Image.new("1", (50_000, 1200)).save(folder / "00002.png")
    (folder / "00003.png").write_text("<html>")
    (folder / "00004.png").unlink()
    Image.new("L", (6000, 100)).save(folder / "00005.png")
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    rows, stdout, stderr = run("--scorers", f"hpsv2,{own}:Brightness,{own}:Wrong", code=2)
    assert [(row["file"], list(row["scores"])) for row in rows] == [("00000.png", [f"{own}:Brightness"])]
    assert "of 1 pictures" in stdout
    for line, words in zip(lines(stderr), (
            "00001.png: not a readable picture .*truncated", "00002.png: 50000x1200 pixels; at most 16384",
            "00003.png: not a readable picture", "00004.png: no such picture", "00005.png: 6000x100 pixels; at most",
            "hpsv2: xswu/HPSv2: .*HPS_v2_compressed.pt", "Wrong: .*finite scores expected"), strict=True):
        assert re.search(words, line)


def test_score_program_refuses_a_bad_listing(run, folder):
    good = b'{"file": "00000.png", "prompt": "x"}\n'
    for content, words in (
            (b'{"file": "../secret.png", "prompt": "x"}', "images.jsonl: '../secret.png' lies outside the folder"),
            (b'{"file": "/etc/x.png", "prompt": "x"}', "images.jsonl: '/etc/x.png' lies outside the folder"),
            (good + b'{"file": 3, "prompt": "x"}', "images.jsonl, line 2: file is 3; str was expected"),
            (good + b'{"file": "00001.png"}', "images.jsonl, line 2: no prompt in it"),
            (good + b'["file"]', "images.jsonl, line 2: ['file'] where an object"),
            (good + b'{"file": "00001', "images.jsonl, line 2: not JSON"),
            (good + b"[" * 100_000, "images.jsonl, line 2: not JSON"),
            (good + b'{"file": "00001.png", "prompt": "caf\xe9"}', "images.jsonl: not JSON or text in UTF-8"),
            (b"", "images.jsonl: no picture in it")):
        (folder / "images.jsonl").write_bytes(content)
        rows, _, stderr = run(code=2)
        assert not rows and len(stderr.splitlines()) == 1 and words in stderr
    (folder / "images.jsonl").write_bytes(b"\xef\xbb\xbf" + good.replace(b"x", b"half \\ud83d"))
    assert score.list_pictures(folder, None) == [{"file": "00000.png", "prompt": "half ?"}]
    (folder / "00000.png").rename(folder.parent / "secret.png")
    (folder / "00000.png").symlink_to(folder.parent / "secret.png")
    (folder.parent / "list.jsonl").write_bytes(good)                 # the pictures lie elsewhere than their list
    for more in ((), ("--prompts", folder.parent / "list.jsonl")):
        rows, _, stderr = run(*more, code=2)
        assert not rows and "l: '00000.png' lies outside the folder, or is a link to there" in stderr


def test_names_of_strangers_do_not_command_the_terminal(run, folder, own):
    (folder / "00000.png").rename(folder / "\x1b[2J.png")
    _, stdout, stderr = run("--scorers", f"{own}:Brightness", code=2)
    assert r"1 pictures ('\x1b[2J.png', ...)" in stdout and "\x1b" not in stdout
    with open(folder / "images.jsonl", "a") as file:
        file.write('{"file": "\\u001b[1J.png", "prompt": "x"}\n')
    _, _, stderr = run("--scorers", f"{own}:Brightness", code=2)
    assert " [1J.png: no such picture" in stderr and "\x1b" not in stderr


def test_score_program_refuses_bad_options(run, tmp_path):
    for option, value, words in (
            ("--batch-size", "0", "must be a whole number of 1 or more"),
            ("--device", "gpu", "must be auto, cpu, cuda"), ("--scorers", " , ", "none given"),
            ("--out", tmp_path, "a folder; give a file, such as")):
        _, _, stderr = run(option, value, code=2)
        assert len(stderr.splitlines()) == 1 and option in stderr and words in stderr


ALIVE = '''
import weakref
alive = weakref.WeakSet()

class One:
    def __init__(self, device):
        assert not alive, "two at once"
        alive.add(self)

    def __call__(self, images, prompts):
        return [len(prompt) for prompt in prompts]

class Two(One):
    def __call__(self, images, prompts):
        return ["none"]
'''


def test_score_program_holds_one_scorer_and_takes_each_once(run, tmp_path):
    (tmp_path / "alive.py").write_text("from counted import One, Two\n")
    (tmp_path / "counted.py").write_text(ALIVE)
    one, two = f"{tmp_path}/alive.py:One", f"{tmp_path}/alive.py:Two"
    rows, stdout, stderr = run("--scorers", f"{two},{one}, {one},0.5*{one},{one}", code=2)
    assert [list(row["scores"]) for row in rows] == [[one, f"0.5*{one}"]] * 6
    assert stdout.count(f"{one}: mean 9.0000") == 1 and len(lines(stderr)) == 1 and "Two: 4 finite" in stderr


def test_score_program_needs_no_prompts_for_aesthetic_alone(folder):
    (folder / "images.jsonl").unlink()
    listed = score.list_pictures(folder, None, promptless=True)
    assert listed == [{"file": f"{n:05d}.png", "prompt": ""} for n in range(6)]
    with pytest.raises(UserError, match="no images.jsonl here"):
        score.list_pictures(folder, None)
