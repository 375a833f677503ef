//! The documents of a file, each on its own: one that cannot be read does not take the others with it.

use super::{Position, Resource, ResourceError, decode, tree};
use std::collections::{BTreeMap, BTreeSet};

/// What a file says, as far as it can be understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    /// What was understood, in the order of the file.
    pub resources: Vec<Resource>,
    /// Where each of these begins.
    pub places: Vec<Position>,
    /// [`Resource::store_key`] of the objects whose documents were refused. Whoever holds the last good
    /// version of one keeps it.
    pub unreadable: BTreeSet<String>,
    /// Of these, the ones of which there is no doubt that a document is them, and where the first such begins. A
    /// document of a kind that nobody has is not among them: it may be any object of its name.
    pub named: BTreeMap<String, Position>,
    /// Of these, what can be put in the place of one that has no last good version, and lets nothing pass that
    /// the document may forbid.
    pub stand_ins: Vec<Resource>,
    /// A document does not even say which object it is: it may be any.
    pub opaque: bool,
    /// What is wrong, in the order of the file; no more than [`MAX_ERRORS`].
    pub errors: Vec<ResourceError>,
    /// How many more errors there are.
    pub more_errors: usize,
}

impl Documents {
    /// Whether everything was understood.
    pub fn is_whole(&self) -> bool {
        self.errors.is_empty()
    }

    /// Notes a document that says which object it is, and cannot be used.
    pub(super) fn refuse(&mut self, object: Option<String>, place: Position, error: ResourceError) {
        match object {
            Some(key) => {
                self.named.entry(key.clone()).or_insert(place);
                self.unreadable.insert(key);
            }
            None => self.opaque = true,
        }
        self.report(error);
    }

    /// Notes an error that concerns no object of ours.
    pub(super) fn report(&mut self, error: ResourceError) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(error);
        } else {
            self.more_errors += 1;
        }
    }
}

/// As many errors of one file are told apart; a file of a million broken documents costs no more.
pub const MAX_ERRORS: usize = 50;

/// Reads every document of a YAML (or JSON) file, `kind: List` unfolded: what is understood and what is not.
///
/// `file` is the name that errors show. Empty documents are passed over.
pub fn read_documents(file: &str, bytes: &[u8]) -> Documents {
    let mut out = Documents::default();
    for chunk in split(bytes) {
        let source = tree::Source { file, lines_before: chunk.lines_before };
        let text = match std::str::from_utf8(chunk.bytes) {
            Ok(text) => text,
            Err(error) => {
                let line = lines(&chunk.bytes[..error.valid_up_to()]) + 1;
                let message = "it is not UTF-8 (save it as UTF-8)".to_owned();
                out.refuse(None, source.position((line, 0)), source.syntax((line, 0), guess(chunk.bytes), message));
                continue;
            }
        };
        match tree::documents(source, text) {
            Ok(trees) => trees.iter().for_each(|tree| decode::document(&tree.cursor(source), &mut out)),
            Err((at, message)) => {
                out.refuse(None, source.position(at), source.syntax(at, guess(chunk.bytes), message));
            }
        }
    }
    out
}

/// Reads every document of a file, or says what is wrong with the first that cannot be used.
///
/// # Errors
/// The first mistake.
pub fn parse_documents(file: &str, text: &str) -> Result<Vec<Resource>, ResourceError> {
    let documents = read_documents(file, text.as_bytes());
    match documents.errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(documents.resources),
    }
}

/// A document as it stands in the file.
#[derive(Debug, PartialEq, Eq)]
struct Chunk<'a> {
    bytes: &'a [u8],
    lines_before: u64,
}

/// Cuts a file where its documents begin and end, without reading them.
///
/// YAML 1.2 (9.1.2) has it that a line which begins with `---` or `...`, and then ends or goes on with white
/// space, is a marker wherever it stands: also inside quotes, brackets and block scalars, whose own lines are
/// indented. So one that is broken cannot hide where the next begins.
fn split(bytes: &[u8]) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let (mut start, mut lines_before) = (0, 0);
    let (mut at, mut line) = (0, 0);
    // Directives (`%YAML 1.2`) stand before the marker of the document that they are for, and only there.
    let (mut begun, mut directives, mut content) = (false, false, false);
    while at < bytes.len() {
        let end = line_end(bytes, at);
        let text = &bytes[at..end];
        let marker = marker(text);
        match marker {
            Some(Marker::Begins) if directives && !content => {}
            Some(marker) => {
                let (close, next) = match marker {
                    Marker::Begins => (at, line),
                    Marker::Ends => (end, line + 1),
                };
                if content || directives {
                    chunks.push(Chunk { bytes: &bytes[start..close], lines_before });
                }
                (start, lines_before) = (close, next);
            }
            None if !begun && !content && text.starts_with(b"%") => directives = true,
            None => content |= has_content(text),
        }
        if let Some(marker) = marker {
            begun = matches!(marker, Marker::Begins);
            directives = false;
            content = begun && has_content(&text[3..]);
        }
        (at, line) = (end, line + 1);
    }
    if content || directives {
        chunks.push(Chunk { bytes: &bytes[start..], lines_before });
    }
    chunks
}

#[derive(Clone, Copy)]
enum Marker {
    Begins,
    Ends,
}

fn marker(line: &[u8]) -> Option<Marker> {
    // Each document may begin with a byte order mark.
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
    let kind = match line.get(..3)? {
        b"---" => Marker::Begins,
        b"..." => Marker::Ends,
        _ => return None,
    };
    line.get(3).is_none_or(u8::is_ascii_whitespace).then_some(kind)
}

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Where the line that begins at `start` ends, its line break included: LF, CR LF or CR.
fn line_end(bytes: &[u8], start: usize) -> usize {
    let rest = &bytes[start..];
    match rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
        Some(at) if rest[at..].starts_with(b"\r\n") => start + at + 2,
        Some(at) => start + at + 1,
        None => bytes.len(),
    }
}

/// How many lines end in it.
fn lines(bytes: &[u8]) -> u64 {
    let (mut at, mut count) = (0, 0);
    while at < bytes.len() {
        at = line_end(bytes, at);
        count += u64::from(matches!(bytes[at - 1], b'\n' | b'\r'));
    }
    count
}

/// Whether a line holds more than white space and a comment.
fn has_content(line: &[u8]) -> bool {
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line).trim_ascii_start();
    !line.is_empty() && !line.starts_with(b"#")
}

/// What a document that cannot be read is likely to be, for people: nothing is decided by it.
fn guess(bytes: &[u8]) -> String {
    let value = |line: &[u8], key: &str| {
        let value = line.strip_prefix(key.as_bytes())?.trim_ascii();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
        let fits = !value.is_empty() && value.len() <= 63 && value.iter().all(plain);
        fits.then(|| String::from_utf8_lossy(value).into_owned())
    };
    let all = || bytes.split(|byte| matches!(byte, b'\n' | b'\r')).take(100);
    let kind = all().find_map(|line| value(line, "kind:"));
    let name = all().find_map(|line| value(line, "  name:"));
    match (kind, name) {
        (Some(kind), Some(name)) => format!("{kind} {name}"),
        (Some(kind), None) => kind,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests;
