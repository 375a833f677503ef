//! What the demo prints: acts, checks with a tick or a cross, and what was seen.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{self, Write};

use super::traffic::{Outcome, Reach};
use crate::output;

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const RESET: &str = "\x1b[0m";

/// Where the demo is told. Counts its checks; a reader that went away (`| head`) ends the demo, see [`Stage::gone`].
#[derive(Debug)]
pub struct Stage {
    colours: bool,
    passed: Cell<usize>,
    failed: Cell<usize>,
    gone: Cell<bool>,
}

impl Stage {
    /// On standard output, coloured if that is a terminal.
    pub fn new() -> Self {
        Self { colours: output::colours(), passed: Cell::new(0), failed: Cell::new(0), gone: Cell::new(false) }
    }

    /// Checks that held and checks that did not.
    pub fn checks(&self) -> (usize, usize) {
        (self.passed.get(), self.failed.get())
    }

    /// Whether nobody reads any more.
    pub fn gone(&self) -> bool {
        self.gone.get()
    }

    /// Whether to colour what others render.
    pub fn colours(&self) -> bool {
        self.colours
    }

    /// An act begins.
    pub fn act(&self, number: u32, title: &str, about: &str) {
        self.line(format!("\n{}", self.paint(BOLD, &format!("{number}  {title}"))));
        about.lines().for_each(|line| self.line(self.paint(DIM, &format!("   {line}"))));
    }

    /// One line as it is.
    pub fn line(&self, text: impl Display) {
        let mut out = io::stdout().lock();
        if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
            self.gone.set(true);
        }
    }

    /// Lines, indented; long ones are folded between words.
    pub fn text(&self, text: &str) {
        for line in text.lines() {
            fold(line).iter().for_each(|part| self.line(format!("   {part}").trim_end()));
        }
    }

    /// A command that shows the same to anybody who types it, on that node.
    pub fn command(&self, node: &str, command: &str) {
        self.line(self.paint(BOLD, &format!("   {node} $ {command}")));
    }

    /// An expectation: a tick, or a cross with what was expected and what was seen instead.
    pub fn check(&self, expected: &str, seen: Result<String, String>) -> bool {
        match &seen {
            Ok(detail) => {
                self.passed.set(self.passed.get() + 1);
                let detail = if detail.is_empty() { String::new() } else { self.paint(DIM, &format!("  ({detail})")) };
                self.line(format!("   {} {expected}{detail}", self.paint(GREEN, "✓")));
            }
            Err(seen) => {
                self.failed.set(self.failed.get() + 1);
                self.line(format!("   {} {}", self.paint(RED, "✗"), self.paint(RED, "not as expected")));
                self.line(format!("       expected: {expected}"));
                seen.lines().for_each(|line| self.line(format!("       seen:     {line}")));
            }
        }
        seen.is_ok()
    }

    /// Who reached what: rows ask, one column a service and family.
    pub fn matrix(&self, cells: &[Reach]) {
        let mut rows: Vec<&str> = Vec::new();
        for cell in cells {
            if !rows.contains(&cell.from.as_str()) {
                rows.push(&cell.from);
            }
        }
        self.line(self.paint(DIM, "                     web: HTTP GET    redis: SET, GET"));
        self.line(self.paint(DIM, "   from               IPv4    IPv6      IPv4    IPv6"));
        for row in rows {
            let mark = |service, family| {
                let cell = cells.iter().find(|c| c.from == row && c.service == service && c.family == family);
                match cell.map(|cell| cell.outcome == Outcome::Works) {
                    Some(true) => self.paint(GREEN, "✓"),
                    Some(false) => self.paint(RED, "✗"),
                    None => self.paint(DIM, "·"),
                }
            };
            let [a, b, c, d] =
                [("web", 4), ("web", 6), ("redis", 4), ("redis", 6)].map(|(service, family)| mark(service, family));
            self.line(format!("   {row:<18} {a}       {b}         {c}       {d}"));
        }
    }

    /// The last word.
    pub fn verdict(&self, good: bool, text: &str) {
        self.line(format!("\n{}", self.paint(if good { GREEN } else { RED }, text)));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("{code}{text}{RESET}") } else { text.to_owned() }
    }
}

/// A line in parts of at most [`WIDTH`] visible characters, the later ones indented. Two blanks are the best place.
fn fold(line: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let (mut part, mut used) = (String::new(), 0);
    let mut line = line;
    if visible(line) > WIDTH
        && let Some((head, tail)) = line.rsplit_once("  ")
    {
        parts.extend(fold(head));
        (part, used, line) = (INDENT.to_owned(), INDENT.len(), tail);
    }
    for word in line.split_inclusive(' ') {
        let width = visible(word);
        if used + visible(word.trim_end()) > WIDTH && used > INDENT.len() {
            parts.push(std::mem::take(&mut part));
            part.push_str(INDENT);
            used = INDENT.len();
        }
        part.push_str(word);
        used += width;
    }
    parts.push(part);
    parts
}

/// Characters that take room: colours do not.
fn visible(text: &str) -> usize {
    let mut colour = false;
    let shown = text.chars().filter(|c| {
        let shown = !colour && *c != '\x1b';
        colour = *c == '\x1b' || (colour && *c != 'm');
        shown
    });
    shown.count()
}

/// Columns that a line of text may take, beside its indentation.
const WIDTH: usize = 112;
const INDENT: &str = "    ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_folded_between_words_and_colours_take_no_room() {
        let word = format!("{RED}{}{RESET} ", "x".repeat(50));
        let parts = fold(&word.repeat(4));
        assert_eq!(parts, [word.repeat(2), format!("{INDENT}{}", word.repeat(2))]);
        assert_eq!(fold("short"), ["short"]);
        let parts = fold(&format!("{}  [rule]", "x ".repeat(55).trim_end()));
        assert_eq!(parts.last().map(String::as_str), Some("    [rule]"));
    }

    #[test]
    fn a_check_that_fails_is_counted_as_one() {
        let stage = Stage { colours: false, passed: Cell::new(0), failed: Cell::new(0), gone: Cell::new(false) };
        assert!(stage.check("two and two", Ok("four".into())));
        assert!(!stage.check("two and two", Err("five".into())));
        assert_eq!(stage.checks(), (1, 1));
    }
}
