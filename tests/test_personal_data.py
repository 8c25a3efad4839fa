"""Personal data: found where it is, and nowhere else."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.personal_data import find_kinds, map_texts, mask_text, texts_of

# Published test numbers and addresses; none belongs to anybody.
FOUND = {
    "e-mail address": [
        ("write to zhang.san+news@mail.example.co.uk.", "write to <EMAIL>."),
        ("邮箱：zhangsan@163.com，谢谢", "邮箱：<EMAIL>，谢谢"),
        ("我的邮箱是li_si@qq.com请联系", "我的邮箱是<EMAIL>请联系"),
        ("[a@b.org](mailto:a@b.org)", "[<EMAIL>](mailto:<EMAIL>)"),
    ],
    "telephone number": [
        ("call (415) 555-2671 now", "call <PHONE> now"),
        ("415-555-2671 or 415.555.2671", "<PHONE> or <PHONE>"),
        ("+1 415-555-2671", "<PHONE>"),
        ("+44 20 7946 0958 is London", "<PHONE> is London"),
        ("Tel. +49 (0)30 901820", "Tel. <PHONE>"),
        ("+8613800138000", "<PHONE>"),
        ("电话13800138000。", "电话<PHONE>。"),
        ("手机：138-0013-8000", "手机：<PHONE>"),
        ("请拨打139 0013 8000联系我", "请拨打<PHONE>联系我"),
        ("座机010-62345678或(021) 62345678", "座机<PHONE>或<PHONE>"),
    ],
    "card number": [
        ("4111 1111 1111 1111, 12/27", "<CREDIT_CARD>, 12/27"),
        ("5500-0000-0000-0004", "<CREDIT_CARD>"),
        ("amex 378282246310005", "amex <CREDIT_CARD>"),
        ("银行卡号6228480402564890018。", "银行卡号<CREDIT_CARD>。"),
    ],
    "bank account number (IBAN)": [
        ("GB29 NWBK 6016 1331 9268 19", "<IBAN>"),
        ("to DE89370400440532013000, please", "to <IBAN>, please"),
        ("账号DE89370400440532013000谢谢", "账号<IBAN>谢谢"),
    ],
    "IP address": [
        ("from 52.14.33.90.", "from <IP_ADDRESS>."),
        ("服务器52.14.33.90:8080无法访问", "服务器<IP_ADDRESS>:8080无法访问"),
        ("2a00:1450:4009:81f::200e", "<IP_ADDRESS>"),
    ],
    "Chinese identity number": [
        ("ID 11010519491231002X", "ID <CN_ID>"),
        ("身份证号11010519491231002X，", "身份证号<CN_ID>，"),
    ],
    "key or password": [
        ("AKIAIOSFODNN7EXAMPLE", "<SECRET>"),
        ("key sk-proj-abcDEF1234567890abcDEF1234567890", "key <SECRET>"),
        ("export TOKEN=ghp_abcdefghijklmnopqrstuvwxyz0123456789", "export TOKEN=<SECRET>"),
        ('api_key = "a8F3kd92LsP0qW7xYz41"', 'api_key = "<SECRET>"'),
        ("密码：aB3dE5fG7hI9jK1lM3", "密码：<SECRET>"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA2mKq==\n-----END RSA PRIVATE KEY-----\nabove",
            "<SECRET>\nabove",
        ),
        ("-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA2mKq\nand so on", "<SECRET>\nand so on"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U", "<SECRET>"),
    ],
}
LEFT_ALONE = [
    "1,234,567,890 people live in 2021-10-12 and 2019-2021",
    "Python 3.11.4 and 1.2.3.4 and Chrome 120.0.6099.109, version 10.15.22.33",
    "127.0.0.1, 192.168.1.10, 10.0.0.1 and 0.0.0.0",
    "pi is 3.14159265358979323846, x = 1234567890123456",
    "git clone git@github.com:user/repo.git; npm i lodash@4.17.21 next@1.0.0-beta.rc",
    "y = A@B.transpose() + X@W.T",
    "0010 1010 1100 and 100 200 300 4000 and 100-200-3000",
    "f(x) = 2 +10 20 30",
    "收入15000000000元，人口13812345678人，2021年10月12日",
    "ISBN 978-3-16-148410-0",
    "[1::2] std::vector 12:30:45 00:1A:2B:3C:4D:5E 2023:11:02",
    "timestamp 1700000000 or 1700000000123",
    "#sk-container-id-1-text-repr-fallback",
    'token = AutoTokenizer.from_pretrained("gpt2")',
    'api_key = os.environ["OPENAI_API_KEY"]; password: hunter2; YOUR_API_KEY_GOES_HERE',
    "0.13800138000 and $13800138000 and 13800138000.55",
    "order 12345678, US1234567890AB, GB29 NWBK 6016 1331 9268 18",  # the last: a wrong check digit
    "4111 1111 1111 1112 and 11010519491231002Y and 110105194913310020",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "uuid 123e4567-e89b-12d3-a456-426614174000",
]
CASES = [(kind, text, masked) for kind, pairs in FOUND.items() for text, masked in pairs]


@pytest.mark.parametrize(("kind", "text", "masked"), CASES, ids=[text[:40] for _, text, _ in CASES])
def test_personal_data_is_replaced_by_its_kind(kind: str, text: str, masked: str) -> None:
    assert mask_text(text) == (masked, [kind])


@pytest.mark.parametrize("text", LEFT_ALONE, ids=[text[:40] for text in LEFT_ALONE])
def test_what_is_no_personal_data_is_left_alone(text: str) -> None:
    assert mask_text(text) == (text, [])


PIECES = st.sampled_from([text for _, text, _ in CASES] + LEFT_ALONE)
AROUND = st.text(alphabet='ab1 9.:-+@/()\n"{}[],是。', max_size=12)
MIXED = st.lists(st.one_of(PIECES, AROUND), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(MIXED)
def test_a_masked_text_holds_none_and_masking_again_changes_nothing(text: str) -> None:
    masked, kinds = mask_text(text)
    assert find_kinds(masked) == []
    assert mask_text(masked) == (masked, [])
    assert bool(kinds) == (masked != text)


JSON = st.recursive(
    st.one_of(MIXED, st.sampled_from([13800138000, 4111111111111111, 7, 1.5, True, None])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(MIXED, inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(MIXED, JSON, min_size=1, max_size=3))
def test_json_stays_json_and_its_values_are_masked_behind_escapes(tree: dict[str, object]) -> None:
    masked = json.loads(mask_text(json.dumps(tree))[0])
    assert not [leaf for leaf in texts_of(masked) if find_kinds(leaf)]
    assert len(masked) == len(tree)


def test_json_without_findings_keeps_its_spelling() -> None:
    text = '{"b": 1.0e5,\n "a": [1, 2]}'
    assert mask_text(text) == (text, [])


def test_a_number_among_arguments_becomes_a_placeholder() -> None:
    assert mask_text('{"phone": 13800138000, "n": 3}') == ('{"phone": "<PHONE>", "n": 3}', ["telephone number"])
    assert map_texts({"phone": 13800138000, "n": 3}, mask_text)[0] == {"phone": "<PHONE>", "n": 3}


def test_json_nested_beyond_reason_is_masked_as_text() -> None:
    for depth in (90, 490, 900, 100_000):
        text = "[" * depth + '"a@b.org"' + "]" * depth
        assert mask_text(text) == (text.replace("a@b.org", "<EMAIL>"), ["e-mail address"])
    assert "<PHONE>" in mask_text("[" * 700 + "13800138000" + "]" * 700)[0]


def test_two_addresses_as_names_of_arguments_keep_both_values() -> None:
    masked, _ = map_texts({"a@b.org": 1, "c@d.org": 2}, mask_text)
    assert sorted(masked.values()) == [1, 2]


HOSTILE = ["a", "1", "1 ", "a@", "1.2.", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "sk-", "+1 2", "key: "]
HOSTILE += ["[{", ": "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_hostile_text_costs_no_more_than_its_length(piece: str) -> None:
    started = time.process_time()
    mask_text(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2
