//! What is echoed of input is cut: a message must not weigh as much as what it is about. And it stays one line, in
//! which nothing hides: what is no visible character is written as its escape.

use std::borrow::Cow;

/// As many characters of input are echoed.
pub const ECHOED: usize = 80;
/// A whole message is no longer than this, in characters: whatever part of it echoes input.
pub const MESSAGE: usize = 1000;

/// A piece of input for a message: its beginning, if it is long, and on one line.
pub fn cut(text: &str) -> Cow<'_, str> {
    cut_to(text, ECHOED)
}

/// A message about input that others put together.
pub fn cut_message(text: &str) -> Cow<'_, str> {
    cut_to(text, MESSAGE)
}

/// The beginning of a text, of at most `most` characters, and how long all of it is.
pub fn cut_to(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", one_line(&text[..end]), text.len())),
        None => one_line(text),
    }
}

/// A text in which line breaks, control characters and what turns the direction of writing are escaped.
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match is_hidden(character) {
            true => out.extend(character.escape_default()),
            false => out.push(character),
        }
    }
    Cow::Owned(out)
}

fn is_hidden(character: char) -> bool {
    // Unicode's line and paragraph separators, joiners and marks of direction, which are no control characters there.
    let format =
        matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    character.is_control() || format
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters_and_a_short_one_is_as_it_was() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"x".repeat(ECHOED)), "x".repeat(ECHOED));
        assert_eq!(cut_to("äöüäöü", 2), "äö… (12 bytes)");
        assert_eq!(cut("a\nb\u{1b}[31mä\"c"), "a\\nb\\u{1b}[31mä\"c");
        assert!(cut(&"9".repeat(1_000_000)).len() < 120);
    }

    #[test]
    fn what_breaks_a_line_or_hides_in_it_is_escaped() {
        assert_eq!(cut("a\nb\r\tc\u{1b}[31m\u{0}"), r"a\nb\r\tc\u{1b}[31m\u{0}");
        assert_eq!(cut("a\u{202e}b\u{2028}c\u{85}d ä…"), r"a\u{202e}b\u{2028}c\u{85}d ä…");
        assert_eq!(cut_to("\n\n\n", 2), r"\n\n… (3 bytes)");
        assert!(matches!(cut("plain \\n"), Cow::Borrowed(_)));
    }
}
