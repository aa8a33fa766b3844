"""FID, by torch-fidelity, whose figures compare with pytorch-fid's."""

import tempfile
from pathlib import Path

import torch

from model.errors import UserError


def fid(pictures: list[Path], real: str, device: torch.device) -> float:
    """It falls with the number of pictures: compare only sides with equally many, best thousands. Of `pictures` alone:
    a folder may hold a sheet, and older pictures."""
    from torch_fidelity import calculate_metrics
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate(pictures):
                (Path(folder) / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
            return calculate_metrics(
                input1=folder, input2=real, fid=True, cuda=device.type == "cuda", batch_size=1, verbose=False,
            )["frechet_inception_distance"]
    except Exception as error:                 # its own, the network's and the decoders' errors have no class in common
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
