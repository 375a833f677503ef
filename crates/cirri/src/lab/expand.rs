//! `$(VAR)` in a container's command, arguments and environment, as Kubernetes has it.
//!
//! `$(VAR)` becomes the variable's value. One that is not set stays as it is written, and `$$` is a plain `$`, so
//! that `$$(VAR)` is how `$(VAR)` itself is written. A shell's `$VAR` and `${VAR}` are the shell's own business.

use std::collections::BTreeMap;

/// The environment, each value expanded with the variables before it.
pub fn environment<'a>(variables: impl Iterator<Item = (&'a str, &'a str)>) -> BTreeMap<String, String> {
    let mut known = BTreeMap::new();
    for (name, value) in variables {
        let value = text(value, &known);
        known.insert(name.to_owned(), value);
    }
    known
}

/// One word, expanded.
pub fn text(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out += before;
        rest = after;
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let Some((name, after)) = rest.strip_prefix('(').and_then(|inside| inside.split_once(')')) else {
            out.push('$');
            continue;
        };
        match variables.get(name) {
            Some(value) => out += value,
            None => out += &format!("$({name})"),
        }
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_and_everything_else_stays() {
        let variables = environment([("A", "1"), ("B", "$(A)2"), ("C", "$(D)"), ("D", "4")].into_iter());
        assert_eq!((variables["B"].as_str(), variables["C"].as_str()), ("12", "$(D)"));
        for (written, meant) in [
            ("$(A)-$(B)", "1-12"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$", "$$"),
            ("$(NONE) $(date)", "$(NONE) $(date)"),
            ("$A ${A} $(A", "$A ${A} $(A"),
            ("$($(A))", "$($(A))"),
            ("ends in $", "ends in $"),
            ("ü$(A)ü", "ü1ü"),
        ] {
            assert_eq!(text(written, &variables), meant, "{written}");
        }
    }
}
