//! Versions in order, as Debian has it.

use std::cmp::Ordering;

/// Whether a package's version (`1:7.88.1-10+deb12u8`) or a program's (`7.88.1`) is this release or newer. What
/// Debian puts before and behind the program's own number does not count.
pub fn at_least(version: &str, least: &str) -> bool {
    compare_part(upstream(version), least) != Ordering::Less
}

/// Which of two package versions is newer: epoch, the program's own version, Debian's revision (Debian policy, 5.6.12).
pub fn compare(a: &str, b: &str) -> Ordering {
    let epoch = |version: &str| version.split_once(':').and_then(|(epoch, _)| epoch.parse::<u32>().ok()).unwrap_or(0);
    let order = epoch(a).cmp(&epoch(b)).then_with(|| compare_part(upstream(a), upstream(b)));
    order.then_with(|| compare_part(revision(a), revision(b)))
}

/// The program's own version: without epoch and revision.
pub fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.rsplit_once('-').map_or(version, |(upstream, _)| upstream)
}

fn revision(version: &str) -> &str {
    version.rsplit_once('-').map_or("0", |(_, revision)| revision)
}

/// Text and numbers by turns. `~` sorts before the end, the end before letters, letters before other signs.
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() || !b.is_empty() {
        let (text_a, text_b) = (take(&mut a, |c| !c.is_ascii_digit()), take(&mut b, |c| !c.is_ascii_digit()));
        let (mut signs_a, mut signs_b) = (text_a.chars(), text_b.chars());
        loop {
            let (sign_a, sign_b) = (signs_a.next(), signs_b.next());
            match weight(sign_a).cmp(&weight(sign_b)) {
                Ordering::Equal if sign_a.is_none() => break,
                Ordering::Equal => {}
                other => return other,
            }
        }
        let number = |digits: &str| digits.parse::<u64>().unwrap_or(0);
        let (digits_a, digits_b) = (take(&mut a, |c| c.is_ascii_digit()), take(&mut b, |c| c.is_ascii_digit()));
        match number(digits_a).cmp(&number(digits_b)) {
            Ordering::Equal => {}
            other => return other,
        }
    }
    Ordering::Equal
}

fn weight(sign: Option<char>) -> u32 {
    match sign {
        Some('~') => 0,
        None => 1,
        Some(letter) if letter.is_ascii_alphabetic() => u32::from(letter),
        Some(other) => u32::from(other) + 256,
    }
}

/// Takes the longest beginning of such signs off `text`.
fn take<'a>(text: &mut &'a str, such: impl Fn(char) -> bool) -> &'a str {
    let end = text.find(|c| !such(c)).unwrap_or(text.len());
    let (taken, rest) = text.split_at(end);
    *text = rest;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_that_debian_has_them_in() {
        let ordered = [
            "0.9",
            "1.0~beta1~svn1245",
            "1.0~beta1",
            "1.0-1~bpo12+1",
            "1.0-1",
            "1.0-1+deb12u1",
            "1.0-1+deb12u10",
            "1.0a",
            "1.0+dfsg1-1",
            "1.0.1-1",
            "1.10-1",
            "1:0.1-1",
            "2:0.1",
        ];
        for (i, a) in ordered.iter().enumerate() {
            for (j, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
        assert_eq!(compare("1.0", "1.0-0"), Ordering::Equal);
        assert_eq!(compare("1.02-1", "1.2-1"), Ordering::Equal);
    }

    #[test]
    fn a_release_is_told_from_an_older_one_by_number_and_not_by_text() {
        for (version, least, enough) in [
            ("1.96.0+dfsg1-1~deb12u2", "1.95", true),
            ("1.95.0+dfsg1-1", "1.95", true),
            ("1.95", "1.95", true),
            ("1.85.0+dfsg3-1~deb12u3", "1.95", false),
            ("1.100.0", "1.95", true),
            ("1.95~rc1-1", "1.95", false),
            ("5:7.0.15-1~deb12u10", "6.0", true),
            ("1:22.1.8-1~deb12u1", "23", false),
            ("7.88.1-10+deb12u8", "7.84", true),
            ("7.9.1", "7.84", false),
        ] {
            assert_eq!(at_least(version, least), enough, "{version} and {least}");
        }
    }
}
