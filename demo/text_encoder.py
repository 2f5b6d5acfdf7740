"""Makes the demo's text encoder: a small CLIP with random weights, which nothing ever trains, and a tokenizer for it.

It understands nothing: it gives each word at each place a vector of its own, and what they mean is learned by the
network that is conditioned on them. A real system takes Stable Diffusion's encoder, whose vectors bring a meaning.
"""

import argparse
import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command
from latent_diffusion.files import new_folder

MAX_LENGTH = 12
WIDTH = 64
SEED = 0

WORD_END = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")

# The merging of a pair of tokens into one.
Merge = tuple[str, str]


def learn_merges(texts: Iterable[str]) -> list[Merge]:
    """Merges, in order, that make one token of each word of the texts (lower case letters, and single numerals).

    Byte pair encoding (R. Sennrich et al., arXiv 1508.07909) until nothing is left to merge. Applied in this order, as
    `CLIPTokenizer` does, they repeat what they did here, so that each word comes out whole.
    """
    words = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(re.findall("[a-z]+", " ".join(texts))))]
    merges = []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        merge = max(sorted(pairs), key=pairs.__getitem__)
        words = [_merged(word, merge) for word in words]
        merges.append(merge)
    return merges


def _merged(word: list[str], merge: Merge) -> list[str]:
    tokens: list[str] = []
    for token in word:
        # A token that was merged just now differs from the first of the pair.
        if tokens and (tokens[-1], token) == merge:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tokens


def write_text_encoder(texts: Iterable[str], folder: Path) -> None:
    """Writes a `CLIPTextModel` and, beside it, the files of a `CLIPTokenizer`, with a token for each word.

    Args:
        texts: of words in lower case letters, and numerals.
        folder: serves as `--text_encoder_name_or_path` and as `--tokenizer_name_or_path`; it appears once whole.
    """
    with new_folder(folder, marker="config.json") as temporary:
        tokens = write_tokenizer(texts, temporary)
        _random_clip(tokens).save_pretrained(str(temporary), safe_serialization=False)


def write_tokenizer(texts: Iterable[str], folder: Path) -> int:
    """Writes the files of a `CLIPTokenizer` with a token for each word of the texts, see `write_text_encoder`.

    Returns:
        How many tokens there are; the last two are those that begin and end a text.
    """
    merges = learn_merges(texts)
    letters = [letter + end for end in ("", WORD_END) for letter in string.ascii_lowercase + string.digits]
    tokens = [*letters, *map("".join, merges), *SPECIAL_TOKENS]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    # CLIP's file has a line of its version first.
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(tokens)


def _random_clip(vocabulary: int):
    runtime.import_paddlenlp()
    import paddle
    from paddlenlp.utils.log import logger
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel

    # PaddleNLP names every file it writes, under its temporary name.
    logger.set_level("WARNING")
    paddle.seed(SEED)
    start, end = vocabulary - 2, vocabulary - 1
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    spread_words(model)
    return model


def spread_words(model) -> None:
    """Draws the vectors of a CLIP text model's words from N(0, 1).

    They begin alike, within 0.02 of each other; the sum of the random layers would bury what is left of them.
    """
    import paddle

    table = model.text_model.embeddings.token_embedding.weight
    table.set_value(paddle.randn(table.shape))


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--captions-file", type=Path, required=True, help="JSON as COCO's, whose words become tokens")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the text encoder and the tokenizer")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    from uvit_ldm.captions import read_captions

    captions = [text for image in read_captions(arguments.captions_file) for text in image.captions]
    runtime.announce(runtime.start())
    write_text_encoder(captions, arguments.output_dir)
    print("the text encoder has random weights and stays as it is: only the U-ViT learns what words mean")


if __name__ == "__main__":
    main()
