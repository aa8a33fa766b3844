"""The words, the text tower and the preference scorer of the paper people.

The scorer is what PickScore is: a CLIP (`model/clip.py`) whose exp(logit_scale) * cosine is the score of a picture
under a caption, trained by Bradley-Terry on pairs (the survey's Eq. 3): -log sigmoid(score(good) - score(bad)).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import CLIP
from model.tokenizer import Tokenizer

from . import data, world

TOKENS = 32                        # captions are shorter; what comes after their end cannot change it
WORD_SCALE = 16                    # a token's state comes to lie at a cosine of about 0.8 to its word and place


def make_tokenizer() -> Tokenizer:
    """CLIP's tokenizer with the few merges that make every word of the captions one token."""
    merges: list[tuple[str, str]] = []
    for word in world.words():
        # Merged with what the words before have brought; then the pieces are joined from the left. New merges come
        # last, so the words before are cut as they were.
        pieces = Tokenizer.from_merges(merges).core.encode(word, add_special_tokens=False).tokens
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return Tokenizer.from_merges(merges)


def make_clip(text: dict, vision: dict, projection_dim: int, tokenizer: Tokenizer) -> CLIP:
    """A CLIP whose embeddings begin small, as transformers' do: torch's own of size 1 would drown the first layers."""
    clip = CLIP(text, vision, projection_dim, eos=tokenizer.eos)
    for module in clip.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)
    return clip


class Student(nn.Module):
    """A CLIP with heads that read off a picture's features what was drawn. They teach the image tower where to look
    and are thrown away: without them it takes far longer to see arms."""

    def __init__(self, clip: CLIP, width: int):
        super().__init__()
        self.clip = clip
        self.attributes = nn.ModuleList([nn.Linear(width, len(values)) for values in world.ATTRIBUTES.values()])
        self.anatomy = nn.Linear(width, 1 + len(world.ANATOMY_FAULTS))

    def see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, 64, 64) -> features (B, D) and unit vectors (B, P)."""
        features = self.clip.vision_model(x)
        return features, F.normalize(self.clip.visual_projection(features), dim=-1)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, N) -> unit vectors (B, P), and the loss of telling each token, word and place, by its state.

        The scores need a caption's last state alone, but the U-Net reads all of them. Left to themselves the states
        within the caption speak of its first words, and "blue" hardly of blue."""
        text, (_, positions) = self.clip.text_model, ids.shape
        context, inside = text(ids), ids != self.clip.eos                        # (B, N, D), (B, N)
        tokens, which = torch.unique((ids * positions + torch.arange(positions))[inside], return_inverse=True)
        words = text.embeddings.token_embedding(tokens // positions)             # (all in the batch, D)
        places = text.embeddings.position_embedding(tokens % positions)
        logits = WORD_SCALE * F.normalize(context[inside], dim=-1) @ F.normalize(words + places, dim=-1).T
        return self.clip.project_text(context, ids), F.cross_entropy(logits.float(), which)


def caption_ids(tokenizer: Tokenizer, people: np.ndarray) -> Tensor:
    """people (N, 6) -> token ids (N, TOKENS)."""
    return tokenizer.encode([world.caption(data.person(numbers)) for numbers in people])[:, :TOKENS]


def make_loss(student: Student, tokenizer: Tokenizer, triples: dict[str, np.ndarray], batch: int, preference: bool):
    """-> loss_of_step for `fit`: contrastive, head and word losses, with `preference` also Bradley-Terry."""
    ids, ids_other = caption_ids(tokenizer, triples["people"]), caption_ids(tokenizer, triples["others"])
    people, others = torch.from_numpy(triples["people"]), torch.from_numpy(triples["others"])
    faults = torch.from_numpy(triples["faults"])

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(ids), (batch,))
        which = [0, 2, 1] if preference else [0, 2]                              # good, other, broken
        pictures = triples["images"][rows.numpy()][:, which].swapaxes(0, 1).reshape(-1, 64, 64, 3)
        x = data.augment(data.to_tensor(pictures))                               # (3B, 3, 64, 64), or 2B
        with torch.autocast("cpu", torch.bfloat16):
            features, seen = student.see(x)
            text, words = student.read(torch.cat([ids[rows], ids_other[rows]]))
            attribute_logits = [head(features) for head in student.attributes]
            anatomy_logits = student.anatomy(features)
        scale = student.clip.logit_scale.clamp(max=4.6).exp()
        good, other, *broken = seen.float().split(batch)                         # (B, P) each
        text, text_other = text.float().chunk(2)

        # Contrastive: every caption has its picture, and one that differs from it in a single attribute.
        logits = scale * torch.cat([good, other]) @ torch.cat([text, text_other]).T
        diagonal = torch.arange(2 * batch)
        contrastive = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2

        shown = torch.cat([people[rows], others[rows], people[rows]])[:len(x)]
        attributes = sum(F.cross_entropy(a.float(), shown[:, i]) for i, a in enumerate(attribute_logits))
        loss = contrastive + attributes / 6 + words
        values = {"contrastive": contrastive.detach(), "attributes": attributes.detach(), "words": words.detach()}
        if preference:
            def score(image: Tensor, text: Tensor) -> Tensor:
                return scale * (image * text).sum(dim=1)

            margins = torch.stack([
                score(good, text) - score(*broken, text),
                score(good, text) - score(other, text),
                score(other, text_other) - score(good, text_other),
                score(good, text) - score(good, text_other)])                    # (4, B)
            bradley_terry = -F.logsigmoid(margins)
            bradley_terry = 0.5 * bradley_terry[0].mean() + 0.5 * bradley_terry[1:].mean()
            anatomy = torch.cat([torch.zeros(2 * batch).long(), faults[rows]])
            seen_faults = F.cross_entropy(anatomy_logits.float(), anatomy)
            loss = 0.3 * contrastive + 2 * bradley_terry + attributes + seen_faults + words
            values |= {
                "bradley_terry": bradley_terry.detach(), "anatomy": seen_faults.detach(),
                "accuracy": (margins > 0).float().mean(dim=1)[0], "accuracy_text": (margins > 0).float().mean(dim=1)[1]}
        return loss, values

    return loss_of_step


@torch.no_grad()
def embed(clip: CLIP, tokenizer: Tokenizer, triples: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """-> unit vectors of the pictures (N, 3, P) and of the first one's captions (N, P)."""
    batches = np.array_split(triples["images"], -(-len(triples["images"]) // 32))
    pictures = torch.cat([clip.embed_images(data.to_tensor(b.reshape(-1, 64, 64, 3))) for b in batches])
    return pictures.unflatten(0, (-1, 3)), clip.embed_text(caption_ids(tokenizer, triples["people"]))


def pair_accuracy(clip: CLIP, tokenizer: Tokenizer, triples: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of pairs of the same caption and seed in which the right picture has the higher score: over all pairs,
    and for every kind of mistake."""
    pictures, captions = embed(clip, tokenizer, triples)
    good, broken, other = (pictures * captions[:, None]).sum(dim=2).T.numpy()    # (N,) each
    won = np.concatenate([good > broken, good > other])
    kinds = np.concatenate([triples["faults"], triples["kinds"]])
    shares = {data.FAULTS[kind]: float(won[kinds == kind].mean()) for kind in np.unique(kinds)}
    return {"overall": float(won.mean()), **shares}
