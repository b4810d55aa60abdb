"""wire/think_tags.py: thinking that a server left in the text, however it is cut."""

import unittest

from portway.wire.think_tags import ThinkTags

# text -> thinking, answer
CASES = {
    "no tag": ("Hello <b>", "", "Hello <b>"),
    "a tag": ("<think>a</think>b", "a", "b"),
    "white space around": ("\n <think>\na\n</think>\n\nb\n", "\na\n", "b\n"),
    "never closed": ("<think>a</thin", "a</thin", ""),
    "closed twice": ("<think>a</think>b</think>c", "a", "b</think>c"),
    "almost a closing tag": ("<think></</think></think>b", "</", "</think>b"),
    "almost an opening tag": ("<thinking>a", "", "<thinking>a"),
    "cut inside the opening tag": ("<thi", "", "<thi"),
    "a tag further in": ("a <think>b</think>", "", "a <think>b</think>"),
    "a second tag": ("<think>a</think><think>b</think>", "a", "<think>b</think>"),
    "only white space": (" \n", "", " \n"),
    "empty thinking": ("<think></think>a", "", "a"),
    "nothing": ("", "", ""),
}


def split(pieces: list[str]) -> tuple[str, str]:
    tags = ThinkTags()
    parts = [tags.split(piece) for piece in pieces]
    parts.append(tags.flush())
    return "".join(thinking for thinking, _ in parts), "".join(answer for _, answer in parts)


class Tags(unittest.TestCase):
    def test_every_case_however_it_is_cut(self):
        """Whole, by character and cut in two at each position, the same thinking and the same answer."""
        for name, (text, thinking, answer) in CASES.items():
            for pieces in ([text], list(text), *([text[:i], text[i:]] for i in range(len(text) + 1))):
                with self.subTest(name, pieces=pieces):
                    self.assertEqual(split(pieces), (thinking, answer))

    def test_text_is_held_no_longer_than_it_may_be_a_tag(self):
        """A stream without tags passes at its first token; thinking passes as it comes."""
        tags = ThinkTags()
        self.assertEqual(tags.split("Hi"), ("", "Hi"))
        self.assertTrue(tags.settled)
        tags = ThinkTags()
        self.assertEqual(tags.split("<think>a b"), ("a b", ""))
        self.assertEqual(tags.split("c</th"), ("c", ""))
        self.assertEqual(tags.split("e"), ("</the", ""))
        self.assertFalse(tags.settled)


if __name__ == "__main__":
    unittest.main()
