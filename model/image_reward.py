"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while it looks at the picture, and a linear head scores what it
read. The first 33 word pieces of a prompt count.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor, nn

from .blip import BLIP
from .checkpoint import load_weights
from .errors import UserError
from .files import was_read
from .hub import find_file
from .open_clip import read_weights
from .preprocess import NetworkScorer, openai_pixels, openai_preprocess
from .reward_head import RewardHead
from .saved_tokenizer import read_saved

WEIGHTS, WORDS = "THUDM/ImageReward", "google-bert/bert-base-uncased"            # on the Hub
MEAN, STD = 0.16717362830052426, 1.0333394966054072            # of the raw scores on the authors' test set
LENGTH = 35
# BLIP's training had them, the score has not; and an index buffer.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class WordPiece:
    """bert-base-uncased's word pieces, with BLIP's two more tokens, as transformers' `BertTokenizer`."""

    def __init__(self, path: Path):
        """From vocab.txt or tokenizer.json."""
        was_read(path)
        try:
            saved = path.suffix == ".json"
            words = models.WordPiece() if saved else models.WordPiece.from_file(str(path), unk_token="[UNK]")
            core = tokenizers.Tokenizer(words)
            core.normalizer = normalizers.BertNormalizer(lowercase=True)
            core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            core = read_saved(path.read_bytes(), str(path), [core]) if saved else core
        except Exception as error:             # the library raises bare Exception on bad content
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: cannot be read as BERT's words ({reason}); download it again") from None
        special = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
        for token in special:
            if core.token_to_id(token) is None:
                raise UserError(f"{path}: no {token} in it; is it bert-base-uncased's?")
        core.add_special_tokens([*special, "[DEC]", "[ENC]"])
        self.core = core
        self.cls, self.sep, self.pad = (core.token_to_id(token) for token in special[:3])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """texts -> ids (B, 35): [CLS], at most 33 pieces, [SEP], padding; and the mask (B, 35), False at padding."""
        rows = [self.core.encode(text, add_special_tokens=False).ids[:LENGTH - 2] for text in texts]
        rows = [[self.cls, *row, self.sep] for row in rows]
        ids = torch.tensor([row + [self.pad] * (LENGTH - len(row)) for row in rows])
        return ids, torch.arange(LENGTH) < torch.tensor([len(row) for row in rows])[:, None]


class ImageRewardNetwork(nn.Module):
    def __init__(self, vision: dict | None = None, text: dict | None = None):
        super().__init__()
        self.blip = BLIP(vision, text)
        self.mlp = RewardHead(self.blip.text_encoder.embeddings.LayerNorm.normalized_shape[0])

    def forward(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """-> (B,): the head's view of [CLS], which BLIP's matching would have replaced by [ENC]; here it stays."""
        return self.mlp(self.blip(images, input_ids, mask)[:, 0])


class ImageReward(NetworkScorer):
    """score = (head - mean) / std: about -2 to 2, and negative for half of all pictures."""

    formula = "(BLIP's reward - 0.1672) / 1.0333"

    def __init__(self, network: ImageRewardNetwork, words: WordPiece):
        self.network, self.words = network, words

    def like(self) -> Tensor:
        return self.network.blip.visual_encoder.pos_embed

    def prepare(self, image: Image.Image) -> Tensor:
        return openai_preprocess(image, self.network.blip.visual_encoder.image_size)

    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        return openai_pixels(pixels, self.network.blip.visual_encoder.image_size)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, mask = self.words.encode(prompts)
        raw = self.network(pixels, ids.to(pixels.device), mask.to(pixels.device))
        return (raw - MEAN) / STD


def load_image_reward(
    source: str, device: str | torch.device, dtype: torch.dtype,
    build: Callable[[], ImageRewardNetwork] = ImageRewardNetwork,
) -> ImageReward:
    """`source` is the weight file, or a folder or Hub id that has it (the authors' repository has a pickle of plain
    tensors and no other form). BERT's words come from a vocab.txt or tokenizer.json beside it, else from the Hub."""
    path = find_file(source, "ImageReward.pt", "model.safetensors")
    tensors = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith(UNUSED)}
    network = load_weights(build, tensors, path, device, dtype)
    beside = [path.parent / name for name in ("vocab.txt", "tokenizer.json") if (path.parent / name).is_file()]
    words_file = beside[0] if beside else find_file(WORDS, "vocab.txt", "tokenizer.json")
    words = WordPiece(words_file)
    size = max(words.core.get_vocab().values()) + 1            # ids may leave gaps
    wanted = len(network.blip.text_encoder.embeddings.word_embeddings.weight)
    if size != wanted:
        raise UserError(f"{words_file}: {size} words with [DEC] and [ENC], and the network has {wanted}")
    return ImageReward(network, words)
