"""Refusals: only answers that do nothing but decline."""

import pytest

from pipeline.data.filters import is_refusal

REFUSALS = [
    "I'm sorry, but as an AI language model I cannot provide that.",
    "I'm sorry, but I can't assist with that.",
    "I cannot fulfill this request.",
    "Sorry, I can't help with that.",
    "I’m sorry, but I can’t help with that request.",
    "I apologize, but I cannot provide assistance with illegal activities.",
    "Unfortunately, I am not able to access real-time data.",
    "I'm an AI language model, so I don't have feelings.",
    "I am sorry, but I am an AI language model and cannot access the weather. Could you name a city?",
    "As an AI, I can't browse the internet. However, you could look at the newspaper.",
    "I am unable to assist with your request.",
    "作为一个人工智能语言模型，我无法提供医疗建议。",
    "很抱歉，我无法回答这个问题。",
    "对不起，作为一个AI语言模型，我不能生成这样的内容。",
    "抱歉，我不能协助您完成此请求。",
    "作为AI助手，我没有个人情感。",
]
ANSWERS = [
    "",
    "I'm sorry to hear that you are feeling down. Try to rest.",
    "Dear John, I'm sorry but I cannot attend the meeting.",
    "I'm sorry, but I cannot attend the meeting tomorrow.",
    "I'm sorry, but I'm unable to come to work today.",
    "I can't believe it is already autumn.",
    "As an AI assistant, I would take the following steps.",
    "Unfortunately, the train was late.",
    "I am an AI researcher from Berlin.",
    'The phrase "As an AI language model, I cannot" is common.',
    "As an AI, I do not have a favourite dish. However, here is a recipe: " + "mix flour and eggs, " * 15,
    "I'm sorry, but I can't help with that. " + "What I can do is explain. " * 40,
    "对不起，我不能参加明天的会议。",
    "很抱歉听到您的遭遇。",
    "作为一个人工智能语言模型，我可以帮你写诗。",
    "人工智能无法取代人类。",
    "我不能同意你的看法。",
]


@pytest.mark.parametrize(("answers", "refused"), [(REFUSALS, True), (ANSWERS, False)])
def test_only_answers_that_do_nothing_but_decline_are_refusals(answers: list[str], refused: bool) -> None:
    assert [answer for answer in answers if is_refusal(answer) != refused] == []
