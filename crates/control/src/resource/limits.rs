//! What a document may cost, by what it weighs: aliases let a few kilobytes stand for gigabytes.

use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{Error, Options};

/// A file is read up to this size, in bytes: a cluster of tens of thousands of pods.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// Values within values: no resource needs a third of it, and other programs' (CustomResourceDefinitions) seldom more.
/// Deeper ones would also need more stack than a thread may have.
const MAX_DEPTH: usize = 48;
/// Values that every document may have, however short it is.
const FREE_VALUES: usize = 10_000;
/// A document that says anything spends at least so many bytes on a value.
const BYTES_PER_VALUE: usize = 4;
/// Bytes of text that every document may have.
const FREE_TEXT: usize = 64 << 10;

/// How to read a document, so that it costs no more than its size warrants.
pub fn yaml_options(document: &str) -> Options {
    Limits::of(document).options()
}

/// Which limit of [`yaml_options`] a document is past; `None` if that is not what is wrong.
pub fn past_limit(document: &str, error: &Error) -> Option<String> {
    Limits::of(document).explain(error)
}

/// The limits of one document.
pub struct Limits {
    bytes: usize,
    values: usize,
    text: usize,
}

impl Limits {
    pub fn of(document: &str) -> Limits {
        let bytes = document.len();
        Limits { bytes, values: FREE_VALUES + bytes / BYTES_PER_VALUE, text: FREE_TEXT + 2 * bytes }
    }

    /// For the parser. What an alias stands for counts as often as it does.
    fn options(&self) -> Options {
        serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_events: 4 * self.values,
                max_nodes: self.values,
                max_total_scalar_bytes: self.text,
                max_recorded_anchor_events: self.values,
                max_recorded_anchor_bytes: self.text,
                max_depth: MAX_DEPTH,
                max_aliases: self.values,
                max_anchors: self.values,
                max_merge_keys: self.values,
                // One set of labels may be meant for a thousand pods: what counts is what they come to.
                enforce_alias_anchor_ratio: false,
            },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: self.values },
            // Comments are read over, and may be as long as they like.
            emit_comments: false,
            with_snippet: false,
        }
    }

    /// Which limit a document is past; `None` if that is not what is wrong.
    pub fn explain(&self, error: &Error) -> Option<String> {
        let Limits { bytes, values, text } = self;
        let mut error = error.without_snippet();
        while let Error::AliasError { error: inner, .. } = error {
            error = inner;
        }
        let what = match error {
            Error::Budget { breach, .. } => match breach {
                BudgetBreach::Depth { .. } => format!("it is nested more than {MAX_DEPTH} deep"),
                BudgetBreach::ScalarBytes { .. } | BudgetBreach::RecordedAnchorBytes { .. } => {
                    format!("it comes to more than {text} bytes of text with its aliases")
                }
                _ => format!("it comes to more than {values} values with its aliases"),
            },
            Error::AliasReplayLimitExceeded { .. } | Error::AliasReplayStackDepthExceeded { .. } => {
                format!("it comes to more than {values} values with its aliases")
            }
            _ => return None,
        };
        Some(format!("{what}, the limit for a document of {bytes} bytes"))
    }
}
