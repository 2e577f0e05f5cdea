"""What each kind of job asks of the model, and what it makes of the answers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blipq.contract import (
    CaptionRequest,
    DescribeRequest,
    EmbedRequest,
    Kind,
    MatchRequest,
    SearchRequest,
    Turn,
    VQARequest,
)
from blipq.index.store import Entry
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.inference.protocol import Submit, checked
from blipq_worker.inference.requests import (
    Array,
    Embed,
    Embedded,
    Explain,
    Generate,
    Generated,
    GeneratedText,
    ImagePixels,
    Match,
    Matched,
    Rank,
    Ranked,
)
from blipq_worker.kinds.registry import SPECS, spec_of
from blipq_worker.kinds.spec import Part

IMAGE = {"uri": "s3://uploads/cat.jpg"}
PIXELS = ImagePixels(pixels=(memoryview(b""),))


def answer(request: Any, image: ImagePixels | None, model: "Model") -> Any:
    return spec_of(request).answer(request, image, model)


class Model:
    """Numbers its texts; scores a text by its last digit."""

    info = SimpleNamespace(family="opt", instructed=False, default_prompt="a photo of")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.notes: list[str] = []
        self.room = 1000
        self.added: list[tuple[str, Entry]] = []

    def all(self, parts: list[Part[Any]]) -> list[Any]:
        return [self.one(part) for part in parts]

    def one(self, part: Part[Any]) -> Any:
        said = {
            Generate: self.generate,
            Match: self.match,
            Explain: self.explain,
            Embed: self.embed,
            Rank: self.rank,
        }
        return part.made(said[type(part.item)](part.item))

    def fits(self, item: Any) -> bool:
        return all(len(prompt) <= self.room for prompt in item.prompts)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def generate(self, item: Generate) -> Generated:
        self.asked.append(item)
        count = item.params.num_return_sequences
        texts = tuple(GeneratedText(f"text {n}", 2) for n in range(count))
        return Generated((texts,) * len(item.prompts))

    def match(self, item: Match) -> Matched:
        self.asked.append(item)
        return Matched(tuple(int(text[-1]) / 10 for text in item.texts))

    def explain(self, item: Explain) -> Embedded:
        self.asked.append(item)
        map_ = Array((3, 1, 2), np.arange(6, dtype=np.float32).tobytes())
        return Embedded({str(number): map_ for number in range(len(item.texts))})

    def rank(self, item: Rank) -> Ranked:
        self.asked.append(item)
        numbers = tuple(-float(len(choice)) for choice in item.choices)
        return Ranked((numbers,) * len(item.prompts))

    def embed(self, item: Embed) -> Embedded:
        self.asked.append(item)
        values = Array((2, 3), np.arange(6, dtype=np.float32).tobytes())
        return Embedded({"image_embeds": values, "image_embeds_proj": values})

    def add(self, index: str, entry: Entry) -> None:
        self.added.append((index, entry))


@pytest.fixture
def model() -> Model:
    return Model()


def caption(model: Model, **fields: Any) -> Any:
    return answer(CaptionRequest.model_validate({"image": IMAGE, **fields}), PIXELS, model)


def test_a_caption_is_one_text_by_default(model: Model) -> None:
    result = caption(model)
    assert [(each.text, each.score) for each in result.captions] == [("text 0", None)]
    assert model.asked[0].params.num_beams == 5


def test_a_caption_goes_on_from_its_prompt(model: Model) -> None:
    caption(model, prompt="a cat that")
    assert "a cat that" in model.asked[0].prompts[0]


def test_several_sequences_are_several_captions(model: Model) -> None:
    result = caption(model, generation={"num_return_sequences": 3})
    assert [each.text for each in result.captions] == ["text 0", "text 1", "text 2"]


def test_the_best_of_several_captions_are_ranked_by_matching(model: Model) -> None:
    result = caption(model, best_of=3)
    assert [(each.text, each.score) for each in result.captions] == [
        ("text 2", 0.2),
        ("text 1", 0.1),
        ("text 0", 0.0),
    ]


@pytest.mark.parametrize(
    ("generation", "best_of", "beams"), [({}, 3, 5), ({}, 8, 8), ({"num_beams": 2}, 4, 4)]
)
def test_the_best_of_several_has_beams_enough(
    model: Model, generation: dict[str, int], best_of: int, beams: int
) -> None:
    caption(model, generation=generation, best_of=best_of)
    assert model.asked[0].params.num_beams == beams


def test_the_best_of_several_may_be_samples(model: Model) -> None:
    caption(model, generation={"do_sample": True, "num_beams": 1}, best_of=4)
    params = model.asked[0].params
    assert (params.num_beams, params.num_return_sequences) == (1, 4)


def test_generation_parameters_reach_the_model(model: Model) -> None:
    caption(model, generation={"max_new_tokens": 7, "do_sample": True, "seed": 3})
    params = model.asked[0].params
    assert (params.max_new_tokens, params.seed) == (7, 3)


def test_each_question_is_a_prompt_of_one_item(model: Model) -> None:
    request = VQARequest.model_validate({"image": IMAGE, "questions": ["why?", "how?"]})
    result = answer(request, PIXELS, model)
    assert [answer.question for answer in result.answers] == ["why?", "how?"]
    assert model.asked[0].prompts == (vqa_prompt("why?", ()), vqa_prompt("how?", ()))


def test_earlier_turns_are_part_of_the_prompt(model: Model) -> None:
    turn = Turn(question="what?", answer="a cat")
    request = VQARequest.model_validate({"image": IMAGE, "questions": "why?", "history": [turn]})
    answer(request, PIXELS, model)
    assert model.asked[0].prompts == (vqa_prompt("why?", (("what?", "a cat"),)),)


TURNS = tuple((f"what is number {number}?", "a cat") for number in range(9))


def chat(model: Model, question: str = "why?", **fields: Any) -> Any:
    history = [{"question": asked, "answer": answer} for asked, answer in TURNS]
    request = {"image": IMAGE, "questions": question, "history": history, **fields}
    answer(VQARequest.model_validate(request), PIXELS, model)
    return model.asked[0].prompts[0]


def test_a_history_that_fits_is_kept_whole(model: Model) -> None:
    assert chat(model) == vqa_prompt("why?", TURNS)
    assert not model.notes


@pytest.mark.parametrize("kept", range(9))
@pytest.mark.parametrize("fields", [{}, {"choices": ["no", "yes"]}])
def test_what_has_no_room_are_the_oldest_turns(
    model: Model, kept: int, fields: dict[str, Any]
) -> None:
    newest = TURNS[len(TURNS) - kept :]
    model.room = len(vqa_prompt("why?", newest))
    assert chat(model, **fields) == vqa_prompt("why?", newest)
    assert model.notes == [f"{9 - kept} of 9 earlier turns were left out: there was no room"]


def test_a_question_with_a_prompt_of_its_own_gets_a_note(model: Model) -> None:
    questions = ["why?", "Question: what is it?\nAnswer:"]
    answer(VQARequest.model_validate({"image": IMAGE, "questions": questions}), PIXELS, model)
    (note,) = model.notes
    assert "leave these words out" in note


def test_the_newest_question_is_never_left_out(model: Model) -> None:
    model.room = 10
    assert chat(model) == vqa_prompt("why?")


def test_choices_are_ranked_with_probabilities_that_add_up(model: Model) -> None:
    request = VQARequest.model_validate(
        {"image": IMAGE, "questions": ["why?", "how?"], "choices": ["maybe", "no", "yes"]}
    )
    result = answer(request, PIXELS, model)
    assert model.asked[0].prompts == (vqa_prompt("why?", ()), vqa_prompt("how?", ()))
    for chosen in result.answers:
        assert chosen.text == "no"
        assert [choice.text for choice in chosen.choices] == ["no", "yes", "maybe"]
        assert [choice.log_likelihood for choice in chosen.choices] == [-2, -3, -5]
        no, yes, maybe = (choice.probability for choice in chosen.choices)
        assert no + yes + maybe == pytest.approx(1)
        assert no / maybe == pytest.approx(math.exp(3))


def test_choices_that_are_all_very_unlikely_still_have_probabilities(model: Model) -> None:
    choices = ["x" * 2000, "x" * 2001]
    request = VQARequest.model_validate({"image": IMAGE, "questions": "why?", "choices": choices})
    result = answer(request, PIXELS, model)
    assert result.answers[0].choices[0].probability == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_a_score_per_text_in_the_order_given(model: Model, head: str) -> None:
    request = MatchRequest.model_validate({"image": IMAGE, "texts": ["a 1", "b 9"], "head": head})
    result = answer(request, PIXELS, model)
    assert [(each.text, each.score) for each in result.scores] == [("a 1", 0.1), ("b 9", 0.9)]
    assert (result.head, model.asked[0].head) == (head, head)


def test_features_keep_their_shape_and_type(model: Model) -> None:
    for dtype in ("float16", "float32"):
        result = answer(EmbedRequest(image=IMAGE, dtype=dtype), PIXELS, model)
        assert result["image_embeds"].shape == (2, 3)
        assert result["image_embeds"].dtype == dtype
        assert result["image_embeds"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("mode", "image", "text"),
    [("image", IMAGE, None), ("text", None, "a cat"), ("multimodal", IMAGE, "a cat")],
)
def test_a_mode_takes_its_own_inputs_and_no_others(
    model: Model, mode: Any, image: Any, text: str | None
) -> None:
    request = EmbedRequest(image=IMAGE, text="a cat", mode=mode)
    assert (spec_of(request).image_of(request) is None) == (image is None)
    answer(request, PIXELS if image else None, model)
    assert (model.asked[0].mode, model.asked[0].text) == (mode, text)


def test_the_parts_of_a_description_are_those_asked_for(model: Model) -> None:
    request = DescribeRequest(image=IMAGE, questions="why?", texts=("a 1", "a 2"), embed=True)
    result = answer(request, PIXELS, model)
    assert result.caption.text == "text 0"
    assert [answer.question for answer in result.vqa.answers] == ["why?"]
    assert [scored.score for scored in result.match.scores] == [0.1, 0.2]
    assert result.embed["image_embeds"].shape == (2, 3)
    only_texts = DescribeRequest(image=IMAGE, caption=False, texts="a 1")
    told = answer(only_texts, PIXELS, model)
    assert (told.caption, told.vqa, told.embed) == (None, None, None)


def test_the_parts_of_a_description_are_what_their_own_jobs_would_ask(model: Model) -> None:
    generation = {"max_new_tokens": 7}
    caption(model, generation=generation)
    vqa = {"image": IMAGE, "questions": "why?", "generation": generation}
    answer(VQARequest.model_validate(vqa), PIXELS, model)
    alone = [(item.prompts, item.params) for item in model.asked]
    model.asked.clear()
    answer(DescribeRequest.model_validate(vqa), PIXELS, model)
    assert [(item.prompts, item.params) for item in model.asked] == alone


@pytest.mark.parametrize(
    ("index", "id", "metadata"),
    [
        ("pets", IMAGE["uri"], {}),
        ({"name": "pets", "id": "7", "metadata": {"a": "b"}}, "7", {"a": "b"}),
    ],
)
def test_an_image_for_an_index_goes_there_and_not_into_the_result(
    model: Model, index: Any, id: str, metadata: dict[str, str]
) -> None:
    image = {**IMAGE, "etag": "1"}
    request = EmbedRequest.model_validate({"image": image, "index": index})
    result = answer(request, PIXELS, model)
    assert (result.arrays, result.indexed) == ({}, id)
    ((name, entry),) = model.added
    assert (name, entry.id, entry.uri, entry.etag) == ("pets", id, IMAGE["uri"], "1")
    assert (entry.metadata, entry.vectors.shape) == (metadata, (2, 3))


SAMPLED = {"do_sample": True}


@pytest.mark.parametrize(
    ("asked", "features"),
    [
        (CaptionRequest(image=IMAGE), {"generation"}),
        (CaptionRequest(image=IMAGE, best_of=2), {"generation", "patches"}),
        (CaptionRequest(image=IMAGE, generation=SAMPLED), {"generation"}),
        (CaptionRequest(image=IMAGE, generation={**SAMPLED, "seed": 1}), {"generation"}),
        (VQARequest(image=IMAGE, questions="why?"), {"generation"}),
        (VQARequest(image=IMAGE, questions="why?", generation=SAMPLED), {"generation"}),
        (MatchRequest(image=IMAGE, texts="a"), {"patches"}),
        (MatchRequest(image=IMAGE, texts="a", head="itc"), {"retrieval"}),
        (EmbedRequest(image=IMAGE), {"retrieval"}),
        (EmbedRequest(image=IMAGE, text="a", mode="multimodal"), {"patches"}),
        (EmbedRequest(image=IMAGE, index={"name": "pets"}), {"retrieval"}),
        (SearchRequest(index="pets", image=IMAGE), {"retrieval"}),
        (DescribeRequest(image=IMAGE), {"generation"}),
        (DescribeRequest(image=IMAGE, generation=SAMPLED), {"generation"}),
        (
            DescribeRequest(image=IMAGE, questions="why?", texts="a", embed=True),
            {"generation", "patches", "retrieval"},
        ),
        (DescribeRequest(image=IMAGE, caption=False, embed=True), {"retrieval"}),
    ],
    # Sets have no order of their own: the names must be the same in every process.
    ids=lambda value: (
        str(value.kind)
        if hasattr(value, "kind")
        else str(sorted(value) if isinstance(value, set) else value)
    ),
)
def test_what_a_job_needs_of_its_image(asked: Any, features: set[str]) -> None:
    assert spec_of(asked).needs(asked) == features


#: As long as a text of a request may be, of characters that take four bytes.
WIDE = "\N{GRINNING FACE}" * 4096
#: Each parameter at its greatest or its least.
GENERATION = {
    **{"max_new_tokens": 512, "min_new_tokens": 512, "num_beams": 16, "num_return_sequences": 16},
    **{"do_sample": True, "temperature": 10, "top_p": 1, "top_k": 1000, "seed": 2**63 - 1},
    **{"repetition_penalty": 10, "no_repeat_ngram_size": 32, "length_penalty": -10},
}
CHOICES = [f"{number:03}{WIDE[3:]}" for number in range(256)]


class Sent(Exception):
    """The items of a job were sent."""


class Wire(Model):
    """Encodes what is sent as for an engine in another process."""

    def all(self, parts: list[Part[Any]]) -> list[Any]:
        for part in parts:
            checked(Submit("default", "normal", None, part.item), 1)
        raise Sent

    def one(self, part: Part[Any]) -> Any:
        return self.all([part])

    def fits(self, item: Any) -> bool:
        checked(Submit("default", "normal", None, item), 1)
        return True


@pytest.mark.parametrize(
    "request_",
    [
        CaptionRequest(image=IMAGE, prompt=WIDE, generation=GENERATION),
        CaptionRequest(image=IMAGE, best_of=16, generation={"num_beams": 1}),
        VQARequest(image=IMAGE, questions=[WIDE] * 64, generation=GENERATION),
        VQARequest(image=IMAGE, questions=[WIDE] * 64, choices=CHOICES),
        VQARequest(
            image=IMAGE,
            questions=["why?"] * 64,
            choices=CHOICES,
            history=[Turn(question=WIDE, answer=WIDE[:3900])] * 4,
        ),
        MatchRequest(image=IMAGE, texts=[WIDE] * 256),
        EmbedRequest(image=IMAGE, text=WIDE, mode="multimodal"),
        DescribeRequest(
            image=IMAGE,
            questions=[WIDE] * 64,
            texts=[WIDE] * 256,
            embed=True,
            generation=GENERATION,
        ),
        SearchRequest(index="cats", text=WIDE),
    ],
    ids=lambda request: request.kind,
)
def test_the_largest_request_of_a_kind_is_within_the_bounds_of_its_items(request_: Any) -> None:
    image = ImagePixels("0" * 64, True) if spec_of(request_).image_of(request_) else None
    with pytest.raises(Sent):
        answer(request_, image, Wire())


def test_every_kind_has_a_spec_in_the_module_of_its_name() -> None:
    assert set(SPECS) == set(Kind)
    for kind, spec in SPECS.items():
        assert spec.kind is kind
        assert type(spec).__module__ == f"blipq_worker.kinds.{kind}"


# --- how sure a text is ---------------------------------------------------------------------------


class Sure(Model):
    """Writes these texts to every prompt."""

    def __init__(self, *texts: GeneratedText) -> None:
        super().__init__()
        self.texts = texts

    def generate(self, item: Generate) -> Generated:
        self.asked.append(item)
        return Generated((self.texts,) * len(item.prompts))


CERTAIN = GeneratedText("a cat 1", 3, -0.1, 0.9, "stop", logprobs=((5, " cat", -0.1),))
DOUBTFUL = GeneratedText("a dog 2", 30, -20.0, 0.4, "length")
LOOP = GeneratedText("a dog", 2, -1.0, 0.6, "loop")


def test_every_kind_of_text_says_how_sure_it_is() -> None:
    """Captions, ranked ones too, answers, and both in a description."""
    fields = {"image": IMAGE, "min_confidence": 0.5}
    model = Sure(CERTAIN, DOUBTFUL)
    captions = caption(model, min_confidence=0.5).captions
    ranked = caption(model, min_confidence=0.5, best_of=2).captions
    asked = answer(VQARequest.model_validate(fields | {"questions": "why?"}), PIXELS, model)
    both = answer(DescribeRequest.model_validate(fields | {"questions": "why?"}), PIXELS, model)
    assert [each.uncertain for each in captions] == [None, True]
    assert [each.uncertain for each in ranked] == [True, None], "the dog matches better"
    for text in (captions[0], ranked[1], asked.answers[0], both.caption.captions[0]):
        assert (text.log_likelihood, text.mean_token_probability) == (-0.1, 0.9)
        assert (text.tokens, text.finish_reason, text.uncertain) == (3, "stop", None)
        assert [(each.id, each.token) for each in text.logprobs] == [(5, " cat")]
    assert both.vqa.answers[0] == asked.answers[0]
    assert not model.notes


def test_without_a_bound_nothing_is_uncertain_and_without_a_number_all_is() -> None:
    assert caption(Sure(DOUBTFUL)).captions[0].uncertain is None
    unknown = Sure(GeneratedText("a cat", 2))
    assert caption(unknown, min_confidence=0.0).captions[0].uncertain is True


def test_a_chosen_answer_is_as_sure_as_its_probability(model: Model) -> None:
    asked = {"image": IMAGE, "questions": "why?", "choices": ["no", "yes"]}
    for least, uncertain in ((0.7, None), (0.8, True)):
        request = VQARequest.model_validate(asked | {"min_confidence": least})
        assert answer(request, PIXELS, model).answers[0].uncertain is uncertain


def test_loops_and_empty_texts_have_a_note() -> None:
    again = GeneratedText("a cat", 2, -1.0, 0.6, "stop", rewritten=True)
    for text, told in (
        (LOOP, "repeated itself and was ended"),
        (again, "written once more"),
        (GeneratedText(" ", 1, -1.0, 0.6, "stop"), "a text is empty"),
    ):
        for ask in (caption, _ask_why):
            model = Sure(text)
            ask(model)
            (note,) = model.notes
            assert told in note


def _ask_why(model: Model) -> Any:
    return answer(VQARequest(image=IMAGE, questions="why?"), PIXELS, model)


def test_loops_are_ended_unless_the_job_says_otherwise(model: Model) -> None:
    caption(model)
    caption(model, generation={"on_loop": "rewrite", "logprobs": True})
    assert [item.params.on_loop for item in model.asked] == ["end", "rewrite"]
    assert [item.params.logprobs for item in model.asked] == [False, True]
