"""What a checkpoint's config.json files ask for, as arguments of our classes.

A key that is absent has the default of diffusers' (or transformers') class, as the files were written to expect. What
asks for something that SD1.5 has not is refused by the key's name: loaded regardless, it would draw wrong pictures.
"""

from collections.abc import Sequence

from .clip import ACTIVATIONS
from .errors import UserError
from .files import is_a


def refuse(where: str, key: str, value: object, wanted: object) -> None:
    raise UserError(f"{where}: {key} is {value!r:.150}, and SD1.5 has {wanted!r}; this model is of another kind")


def check_config(where: str, config: dict, fixed: dict[str, object], free: Sequence[str]) -> None:
    """Refuses by name what SD1.5 has not: a key of `fixed` with another value than those listed (absent or null will
    do), or an unknown key that asks for something. Keys in `free` are read, or do not change a picture."""
    for key, value in config.items():
        if key.startswith("_") or key in free or value is None or value is False:
            continue
        if key not in fixed:
            refuse(where, key, value, None)
        if value != fixed[key]:
            refuse(where, key, value, fixed[key])
    for key, value in fixed.items():
        if value is True and config.get(key) is False:
            refuse(where, key, False, True)


LEVELS = 8                                     # of a U-Net or VAE, at most; SD1.5 has 4


def numbers(where: str, config: dict, defaults: dict[str, int | tuple[int, ...]]) -> dict:
    """Of config the keys of `defaults`: a whole number from 1 on, or a list of them where the default is a tuple. No
    network is as wide, as deep or of as many levels as the limits: a damaged number is not to be built from."""
    found = {}
    for key, default in defaults.items():
        value, several = config.get(key, default), isinstance(default, tuple)
        items, limit = value if several else [value], 64 if "layers" in key else 500_000
        if not isinstance(items, (list, tuple)) or not 0 < len(items) <= LEVELS \
                or not all(is_a(n, int) and 0 < n <= limit for n in items):
            refuse(where, key, value, "a list of whole numbers" if several else "a whole number")
        found[key] = tuple(value) if several else value
    return found


def check_divides(where: str, key: str, number: int, widths: Sequence[int]) -> None:
    if any(width % number for width in widths):
        raise UserError(f"{where}: {key} is {number}, which does not divide {' and '.join(map(str, widths))}")


UNET_FIXED = {
    "act_fn": "silu", "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "out_channels": 4, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn", "conv_in_kernel": 3, "conv_out_kernel": 3, "dropout": 0.0,
    "transformer_layers_per_block": 1, "time_embedding_type": "positional", "resnet_out_scale_factor": 1.0,
    "attention_type": "default", "addition_embed_type_num_heads": 64}
VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True}


def unet_arguments(config: dict, where: str) -> dict:
    free = (
        "block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim", "norm_num_groups",
        "sample_size", "down_block_types", "up_block_types", "upcast_attention")
    if config.get("in_channels", 4) != 4:
        raise UserError(f"{where}: in_channels is {config['in_channels']}: an inpainting or depth model, not SD1.5's 4")
    check_config(where, config, UNET_FIXED, free)
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    attention = [kind == "CrossAttnDownBlock2D" for kind in down] if isinstance(down, list) else []
    expected = [("CrossAttnDownBlock2D" if a else "DownBlock2D") for a in attention]
    mirrored = [("CrossAttnUpBlock2D" if a else "UpBlock2D") for a in reversed(attention)]
    if down != expected or up != mirrored:
        refuse(where, "down_block_types / up_block_types", (down, up), (expected, mirrored))
    arguments = numbers(where, config, {
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
        "cross_attention_dim": 1280, "norm_num_groups": 32})
    widths = arguments["block_out_channels"]
    if len(widths) != len(down):
        refuse(where, "block_out_channels", widths, f"{len(down)} widths, one for each of down_block_types")
    if widths[0] % 2:
        refuse(where, "block_out_channels", widths, "an even first width, for the sines and cosines of the step")
    check_divides(where, "norm_num_groups", arguments["norm_num_groups"], widths)
    attended = [width for width, a in zip(widths, attention) if a] + [widths[-1]]      # the middle block always has it
    check_divides(where, "attention_head_dim", arguments["attention_head_dim"], attended)
    size = config.get("sample_size")
    if size is not None:
        several = isinstance(size, list)
        numbers(where, config, {"sample_size": (64, 64) if several else 64})
        if several and len(size) != 2:
            refuse(where, "sample_size", size, 64)
    return {**arguments, "attention": tuple(attention)}


def vae_arguments(config: dict, where: str) -> dict:
    free = (
        "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor", "sample_size",
        "down_block_types", "up_block_types", "force_upcast")
    check_config(where, config, VAE_FIXED, free)
    arguments = numbers(where, config, {
        "block_out_channels": (64,), "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 4})
    widths, factor = arguments["block_out_channels"], config.get("scaling_factor", 0.18215)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if config.get(key, [kind]) != [kind] * len(widths):
            refuse(where, key, config.get(key), [kind] * len(widths))
    if arguments["latent_channels"] != 4:
        refuse(where, "latent_channels", config["latent_channels"], 4)
    if not is_a(factor, float) or not 0 < factor < 1e6:
        refuse(where, "scaling_factor", factor, 0.18215)
    check_divides(where, "norm_num_groups", arguments["norm_num_groups"], widths)
    return {**arguments, "scaling_factor": factor}


def text_arguments(config: dict, where: str) -> dict:
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return tower_arguments(config, where, {
        "vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "intermediate_size": 2048, "max_position_embeddings": 77})


def tower_arguments(config: dict, where: str, defaults: dict[str, int]) -> dict:
    """Either tower of a CLIP."""
    act = config.get("hidden_act", "quick_gelu")
    if act not in list(ACTIVATIONS):
        refuse(where, "hidden_act", act, " or ".join(ACTIVATIONS))
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        refuse(where, "layer_norm_eps", config["layer_norm_eps"], 1e-5)
    arguments = numbers(where, config, defaults)
    check_divides(where, "num_attention_heads", arguments["num_attention_heads"], [arguments["hidden_size"]])
    return {**arguments, "hidden_act": act}


def check_scheduler(config: dict, where: str) -> None:
    """Refuses a schedule that is not SD1.5's kind, by the key that says so."""
    fixed = {
        "num_train_timesteps": 1000, "rescale_betas_zero_snr": False, "thresholding": False,
        "solver_order": 2, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
        "use_flow_sigmas": False}
    choices = {
        "beta_schedule": ("scaled_linear", "linear"), "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("linspace", "leading", "trailing"), "final_sigmas_type": ("zero", "sigma_min")}
    # What DEIS and UniPC have is DPM-Solver++'s here, as in diffusers when one is made into the other.
    solvers = {"algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho", "bh1", "bh2")}
    for key, value in fixed.items():
        if config.get(key) not in (None, value):
            refuse(where, key, config[key], value)
    choices |= {key: values for key, values in solvers.items() if config.get(key) is not None}
    for key, values in choices.items():
        if key in config and config[key] not in values:
            refuse(where, key, config[key], " or ".join(values))
    betas = {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or len(trained) != 1000:
            refuse(where, "trained_betas", trained, "none, or 1000 of them")
        betas |= {f"trained_betas[{i}]": beta for i, beta in enumerate(trained)}
    for key, beta in betas.items():
        if not is_a(beta, float) or not 0 < beta < 1:
            refuse(where, key, beta, "numbers between 0 and 1")
    if not is_a(config.get("steps_offset", 0), int) or config.get("steps_offset", 0) not in (0, 1):
        refuse(where, "steps_offset", config["steps_offset"], 1)


def clip_arguments(config: dict, where: str) -> dict:
    """CLIPModel's config.json (a scorer's) -> the arguments of `CLIP`, less `eos`."""
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{where}: no {part}; expected the config of a CLIPModel")
    vision = tower_arguments(config["vision_config"], where, {
        "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072})
    if vision["patch_size"] > vision["image_size"]:
        refuse(where, "patch_size", vision["patch_size"], f"at most image_size, {vision['image_size']}")
    return {
        "text": text_arguments(config["text_config"], where), "vision": vision,
        **numbers(where, config, {"projection_dim": 512})}
