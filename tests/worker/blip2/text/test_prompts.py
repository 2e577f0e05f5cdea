"""Prompts and LAVIS's preprocessing of texts."""

import pytest

from blipq_worker.catalog.prompts import caption_prompt, match_text, vqa_prompt


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("A Woman and Her Dog", "a woman and her dog"),
        ('Two cats (asleep). "Really!"', "two cats asleep really"),
        ("a*b#c:d;e~f", "a b c d e f"),
        ("is it   red?\n", "is it red?"),
        ("tabs\t\tand\n\nlines", "tabs and lines"),
        ("<image>, it's 50%", "<image>, it's 50%"),
        ("!!!", ""),
    ],
)
def test_match_texts_are_cleaned_as_in_training(written: str, seen: str) -> None:
    assert match_text(written) == seen


def test_a_match_text_keeps_its_first_fifty_words() -> None:
    assert match_text(" ".join(["word"] * 60)).count("word") == 50


def test_a_question_is_asked_as_the_evaluations_ask_it() -> None:
    assert vqa_prompt("how many {}?") == "Question: how many {}? Short answer:"


@pytest.mark.parametrize("written", ["is it red?\n", "  is it red?", "is\r\nit \t red?"])
def test_white_space_around_a_question_changes_no_answer(written: str) -> None:
    assert vqa_prompt(written) == vqa_prompt("is it red?")
    assert vqa_prompt("why?", [(written, "no\n")]) == vqa_prompt("why?", [("is it red?", "no")])
    assert caption_prompt(" a photo of \n", "") == "a photo of"


def test_earlier_turns_come_first_as_in_the_authors_chat() -> None:
    assert vqa_prompt("why?", [("what is it?", "a cat"), ("is it big?", "no")]) == (
        "Question: what is it? Answer: a cat. Question: is it big? Answer: no. "
        "Question: why? Answer:"
    )


def test_an_empty_caption_prompt_is_not_the_default() -> None:
    assert caption_prompt(None, "a photo of") == "a photo of"
    assert caption_prompt("", "a photo of") == ""
