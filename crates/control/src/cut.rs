//! What is echoed of input is cut: a message must not weigh as much as what it is about.

use std::borrow::Cow;

/// As many characters of input are echoed.
pub const ECHOED: usize = 80;
/// A whole message is no longer than this, in characters: whatever part of it echoes input.
pub const MESSAGE: usize = 1000;

/// A piece of input for a message: its beginning, if it is long, and on one line.
pub fn cut(text: &str) -> Cow<'_, str> {
    let cut = cut_to(text, ECHOED);
    match cut.chars().any(char::is_control) {
        true => Cow::Owned(cut.chars().flat_map(shown).collect()),
        false => cut,
    }
}

/// A character, or how it is written if it would break the line or do something to a terminal.
fn shown(of: char) -> impl Iterator<Item = char> {
    let escaped = of.is_control().then(|| of.escape_debug());
    let plain = (!of.is_control()).then_some(of);
    escaped.into_iter().flatten().chain(plain)
}

/// A message about input that others put together.
pub fn cut_message(text: &str) -> Cow<'_, str> {
    cut_to(text, MESSAGE)
}

/// The beginning of a text, of at most `most` characters, and how long all of it is.
pub fn cut_to(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &text[..end], text.len())),
        None => Cow::Borrowed(text),
    }
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
}
