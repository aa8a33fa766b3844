"""How far the networks are from diffusers' and transformers' with the same random weights, as tests/test_networks.py
builds them.

    python -m benchmarks.parity [NAME ...] [--device cuda]    # only the rows with each NAME in them: "U-Net", "full"
"""

import argparse

import torch

from tests.test_networks import CASES, parity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print("| module | size | float32 rel. error | float64 abs. error |\n|---|---|---|---|")
    for name, case in CASES.items():
        if all(word in name for word in args.names):
            module, size = name.rsplit(", ", 1)
            relative = parity(case, torch.float32, args.device)[1]
            absolute = parity(case, torch.float64, args.device)[0]
            print(f"| {module} | {size} | {relative:.1e} | {absolute:.1e} |", flush=True)


if __name__ == "__main__":
    main()
