"""Prompts of Table V, and captions as labels."""

from __future__ import annotations

import pytest
from lavcap.config import PretrainedLanguage, PromptSet, RandomLlama
from lavcap.language import build_tokenizer
from lavcap.prompts import PROMPT_I, PROMPT_III, WORDINGS, Slot, test_prompt, training_prompts
from lavcap.text import IGNORED, encode_text

CAPTIONS = ["A dog barks while rain falls", "An engine hums — loudly"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return build_tokenizer(RandomLlama(vocabulary=400), CAPTIONS, tmp_path_factory.mktemp("tokenizer"))


def spelled(prompts: PromptSet) -> str:
    """As Table V prints them."""
    prompt = test_prompt(prompts)
    names = {Slot.FUSED: "[a+v]", Slot.AUDIO: "[a]", Slot.VISUAL: "[v]"}
    slots = [names[slot] for slot in prompt.slots] + [""]
    return "".join(text + slot for text, slot in zip(prompt.text, slots))


def test_table_v() -> None:
    assert spelled(PromptSet.I) == "USER: <Audio>[a+v]</Audio> Please describe the audio.\nASSISTANT:"
    assert spelled(PromptSet.II) == "USER: <Content>[a+v]</Content> Please describe the content.\nASSISTANT:"
    assert spelled(PromptSet.III) == (
        "USER: <Audio>[a]</Audio><Visual>[v]</Visual> Please describe the audio and visual elements.\nASSISTANT:"
    )
    assert test_prompt(PromptSet.MULTI) == PROMPT_I


def test_the_set_for_training_has_eight_wordings_of_one_shape() -> None:
    assert len(set(WORDINGS)) == 8 and WORDINGS[0] == PROMPT_I
    assert {prompt.slots for prompt in training_prompts(PromptSet.MULTI)} == {PROMPT_I.slots}
    assert training_prompts(PromptSet.III) == (PROMPT_III,)


def test_prompts_are_padded_on_the_left_and_captions_end(tokenizer) -> None:
    batch = encode_text(tokenizer, [WORDINGS[0], WORDINGS[2]], CAPTIONS)
    for row, prompt in enumerate((WORDINGS[0], WORDINGS[2])):
        pieces = [ids[row][mask[row]].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_masks"])]
        assert pieces[0][0] == tokenizer.bos_token_id
        assert [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces] == list(prompt.text)
        assert all(mask[row, -1] for mask in batch["prompt_masks"])
        labels = batch["labels"][row]
        kept = labels[labels != IGNORED].tolist()
        assert kept[-1] == tokenizer.eos_token_id and kept.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(kept[:-1]) == f" {CAPTIONS[row]}"
    assert not batch["prompt_masks"][1].all() and (batch["labels"] == IGNORED).any()


def test_errors(tokenizer) -> None:
    with pytest.raises(ValueError, match="one batch holds prompts with the same slots"):
        encode_text(tokenizer, [PROMPT_I, PROMPT_III], None)
    with pytest.raises(ValueError, match="2 prompts need as many captions; got 1"):
        encode_text(tokenizer, [PROMPT_I, PROMPT_I], CAPTIONS[:1])
    with pytest.raises(ValueError, match="needs captions to train its tokenizer on"):
        build_tokenizer(RandomLlama())


def test_a_trained_tokenizer_is_found_again(tmp_path) -> None:
    first = build_tokenizer(RandomLlama(), CAPTIONS, tmp_path)
    again = build_tokenizer(RandomLlama(), ["other words altogether"], tmp_path)
    assert again.get_vocab() == first.get_vocab()
    from_hub_or_folder = build_tokenizer(PretrainedLanguage(name=str(tmp_path)))
    assert from_hub_or_folder.get_vocab() == first.get_vocab()
    assert again.eos_token_id is not None and again.pad_token_id is not None


def test_a_tokenizer_of_llama_2s_kind() -> None:
    """Words begin with a mark there, which a caption's first word must get once, whatever stands before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([*CAPTIONS, *PROMPT_I.text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    labels = encode_text(tokenizer, [PROMPT_I], ["A dog barks"])["labels"][0].tolist()
    assert "".join(tokenizer.convert_ids_to_tokens(labels[:-1])) == "▁A▁dog▁barks"
    assert labels[-1] == tokenizer.eos_token_id and tokenizer.decode(labels, skip_special_tokens=True) == "A dog barks"
