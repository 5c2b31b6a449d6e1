"""The task's character tokenizer: one token per character, and its id is the character's place in the alphabet."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deploy.sums.task import ALPHABET, PAD, STOP


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer without a BOS, whose eos is the stop character. A character outside the alphabet raises an error."""
    core = Tokenizer(models.WordLevel({character: index for index, character in enumerate(ALPHABET)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=STOP,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
