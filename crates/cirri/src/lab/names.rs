//! Names that fit: what a lab makes is called after pods and nodes, whose names may be longer than a file's.

use crate::workload::digest;

/// Longest name of a file, a directory, a control group or a namespace that is made of others' names. The kernel takes
/// 255 bytes; the rest is for what is put behind: a number, an extension, the mark of a temporary file.
pub const LONGEST: usize = 200;
/// What stands between a name that was cut and its digest. No name of a pod, a node or a namespace has one.
pub const MARK: char = '_';
/// The mark and 64 bits in hexadecimal.
const DIGEST: usize = 17;

/// The name itself, or if that is longer than `max`, its beginning and a digest of all of it.
pub fn fitting(name: &str, max: usize) -> String {
    if name.len() <= max {
        return name.to_owned();
    }
    let beginning = &name[..name.floor_char_boundary(max.saturating_sub(DIGEST))];
    format!("{beginning}{MARK}{:016x}", digest(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_stay_and_long_ones_differ_and_fit() {
        assert_eq!(fitting("web", 3), "web");
        let long = |end: &str| fitting(&format!("{}{end}", "a".repeat(300)), LONGEST);
        assert_eq!((long("b").len(), long("c").len()), (LONGEST, LONGEST));
        assert_ne!(long("b"), long("c"));
        assert!(long("b").starts_with("aaa"));
    }
}
