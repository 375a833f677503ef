//! `arch`: the crates depend on each other, and on the outside, as ARCHITECTURE.md says.
//!
//! The table stands between two marks in that file, one line a room:
//!
//! ```text
//! | room | crate | may depend on | outside crates |
//! | `crates/abi` | `cirri-abi` | nothing | nothing |
//! | `crates/bpf` | `cirri-bpf` | `cirri-abi`, `cirri-datapath` | only `aya-ebpf` |
//! | `crates/control` | `cirri-control` | `cirri-abi` | any but `tokio`, `aya` |
//! ```
//!
//! Dependencies of tests (`[dev-dependencies]`) are not judged: a test may stand in any room.

use crate::{host, sh, table};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub fn command() -> Result<()> {
    let rooms = check()?;
    println!("{rooms} rooms, as ARCHITECTURE.md draws them");
    Ok(())
}

/// Fails when code and table disagree; answers the number of rooms.
pub fn check() -> Result<usize> {
    let path = host::workspace().join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules = parse_table(&text).context("the table in ARCHITECTURE.md cannot be read")?;
    let packages = packages()?;
    let faults = judge(&rules, &packages);
    if !faults.is_empty() {
        let rows: Vec<Vec<String>> = faults.iter().map(|f| vec![f.krate.clone(), f.what.clone()]).collect();
        bail!(
            "code and ARCHITECTURE.md disagree. Change the one that is wrong:\n{}",
            table::render(&["crate", "what"], &rows)
        );
    }
    Ok(rules.len())
}

/// What one room may use.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    room: String,
    krate: String,
    rooms: BTreeSet<String>,
    outside: Outside,
}

#[derive(Debug, PartialEq, Eq)]
enum Outside {
    Any,
    AnyBut(BTreeSet<String>),
    /// Empty: nothing.
    Only(BTreeSet<String>),
}

/// What one package uses, as its manifest says.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    /// Its directory below the checkout's root.
    room: String,
    rooms: BTreeSet<String>,
    outside: BTreeSet<String>,
}

#[derive(Debug)]
struct Fault {
    krate: String,
    what: String,
}

fn judge(rules: &[Rule], packages: &[Package]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |krate: &str, what: String| faults.push(Fault { krate: krate.to_owned(), what });
    let by_crate: BTreeMap<&str, &Rule> = rules.iter().map(|r| (r.krate.as_str(), r)).collect();
    for package in packages {
        let name = package.name.as_str();
        let Some(rule) = by_crate.get(name) else {
            fault(name, format!("{} is a room without a line in the table", package.room));
            continue;
        };
        if rule.room != package.room {
            fault(name, format!("the table says it lives in {}, but it is in {}", rule.room, package.room));
        }
        for room in package.rooms.difference(&rule.rooms) {
            fault(name, format!("uses {room}, which its line does not allow"));
        }
        for outside in package.outside.iter().filter(|o| !rule.outside.allows(o)) {
            fault(name, format!("uses {outside} from outside, which its line does not allow"));
        }
    }
    for rule in rules.iter().filter(|r| packages.iter().all(|p| p.name != r.krate)) {
        fault(&rule.krate, format!("has a line in the table, but there is no such crate in {}", rule.room));
    }
    faults
}

impl Outside {
    fn allows(&self, name: &str) -> bool {
        match self {
            Outside::Any => true,
            Outside::AnyBut(refused) => !refused.contains(name),
            Outside::Only(allowed) => allowed.contains(name),
        }
    }
}

const BEGIN: &str = "<!-- arch:begin -->";
const END: &str = "<!-- arch:end -->";

fn parse_table(text: &str) -> Result<Vec<Rule>> {
    let (_, rest) = text.split_once(BEGIN).with_context(|| format!("there is no `{BEGIN}`"))?;
    let (body, _) = rest.split_once(END).with_context(|| format!("there is no `{END}` after `{BEGIN}`"))?;
    let lines = body.lines().map(str::trim).filter(|l| l.starts_with('|'));
    let rules = lines.skip(2).map(parse_line).collect::<Result<Vec<_>>>()?; // Heading and rule.
    if rules.is_empty() {
        bail!("the table has no lines");
    }
    Ok(rules)
}

fn parse_line(line: &str) -> Result<Rule> {
    let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
    let [room, krate, rooms, outside] = cells.as_slice() else {
        bail!("a line needs four cells (room, crate, may depend on, outside crates): {line}");
    };
    let (Some(room), Some(krate)) = (names(room).pop_first(), names(krate).pop_first()) else {
        bail!("room and crate stand in backquotes: {line}");
    };
    let allowed = names(rooms);
    if allowed.is_empty() && *rooms != "nothing" {
        bail!("`may depend on` is crates in backquotes or the word nothing, not {rooms:?}: {line}");
    }
    let listed = names(outside);
    let outside = match (outside.split('`').next().unwrap_or_default().trim(), listed.is_empty()) {
        ("nothing", true) => Outside::Only(BTreeSet::new()),
        ("any", true) => Outside::Any,
        ("any but", false) => Outside::AnyBut(listed),
        ("only", false) => Outside::Only(listed),
        _ => bail!("`outside crates` is nothing, any, only `a`, or any but `a`, not {outside:?}: {line}"),
    };
    Ok(Rule { room, krate, rooms: allowed, outside })
}

/// The words in backquotes.
fn names(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every package of the checkout: the workspace's, and those that are workspaces of their own.
fn packages() -> Result<Vec<Package>> {
    let root = host::workspace();
    let mut all = Vec::new();
    for manifest in ["Cargo.toml", "crates/bpf/Cargo.toml", "fuzz/Cargo.toml"].map(|m| root.join(m)) {
        if manifest.exists() {
            let mut cargo = host::cargo();
            cargo.args(["metadata", "--format-version", "1", "--no-deps", "--manifest-path"]).arg(&manifest);
            all.extend(parse_metadata(&sh::capture(&mut cargo)?, &root)?);
        }
    }
    Ok(all)
}

fn parse_metadata(json: &str, root: &Path) -> Result<Vec<Package>> {
    let value: serde_json::Value = serde_json::from_str(json).context("cargo metadata printed no JSON")?;
    let text = |v: &serde_json::Value, key: &str| v.get(key).and_then(|s| s.as_str()).map(str::to_owned);
    let list = |v: &serde_json::Value, key: &str| v.get(key).and_then(|l| l.as_array()).cloned().unwrap_or_default();
    let mut packages = Vec::new();
    for package in list(&value, "packages") {
        let name = text(&package, "name").context("a package without a name")?;
        let manifest = text(&package, "manifest_path").context("a package without a manifest")?;
        let directory = Path::new(&manifest).parent().unwrap_or(root);
        let room = directory.strip_prefix(root).unwrap_or(directory).display().to_string();
        let (mut rooms, mut outside) = (BTreeSet::new(), BTreeSet::new());
        for dependency in list(&package, "dependencies").iter().filter(|d| text(d, "kind").as_deref() != Some("dev")) {
            let name = text(dependency, "name").context("a dependency without a name")?;
            if text(dependency, "path").is_some() {
                rooms.insert(name)
            } else {
                outside.insert(name)
            };
        }
        packages.push(Package { name, room, rooms, outside });
    }
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
prose
<!-- arch:begin -->
| room | crate | may depend on | outside crates |
|---|---|---|---|
| `crates/abi` | `cirri-abi` | nothing | nothing |
| `crates/bpf` | `cirri-bpf` | `cirri-abi` | only `aya-ebpf` |
| `crates/control` | `cirri-control` | `cirri-abi` | any but `tokio` |
<!-- arch:end -->
| `not` | `a line` | nothing | any |
";

    fn package(name: &str, room: &str, rooms: &[&str], outside: &[&str]) -> Package {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Package { name: name.into(), room: room.into(), rooms: set(rooms), outside: set(outside) }
    }

    fn as_drawn() -> Vec<Package> {
        vec![
            package("cirri-abi", "crates/abi", &[], &[]),
            package("cirri-bpf", "crates/bpf", &["cirri-abi"], &["aya-ebpf"]),
            package("cirri-control", "crates/control", &["cirri-abi"], &["serde"]),
        ]
    }

    #[test]
    fn code_that_matches_the_table_has_no_faults() {
        assert!(judge(&parse_table(TABLE).unwrap(), &as_drawn()).is_empty());
    }

    #[test]
    fn each_way_to_disagree_is_a_fault() {
        let rules = parse_table(TABLE).unwrap();
        let cases = [
            (0, package("cirri-abi", "crates/abi", &[], &["serde"]), "uses serde from outside"),
            (1, package("cirri-bpf", "crates/bpf", &["cirri-control"], &[]), "uses cirri-control"),
            (2, package("cirri-control", "crates/control", &[], &["tokio"]), "uses tokio"),
            (2, package("cirri-control", "control", &[], &[]), "lives in crates/control"),
            (2, package("cirri-new", "crates/new", &[], &[]), "without a line"),
        ];
        for (at, changed, says) in cases {
            let mut packages = as_drawn();
            packages[at] = changed;
            let faults = judge(&rules, &packages);
            assert!(faults.iter().any(|f| f.what.contains(says)), "{says}: {faults:?}");
        }
        assert!(judge(&rules, &as_drawn()[..2]).iter().any(|f| f.what.contains("no such crate")));
    }

    #[test]
    fn a_table_that_cannot_be_read_is_an_error() {
        let line = |l: &str| format!("{BEGIN}\n| a | b |\n|---|---|\n{l}\n{END}");
        for text in [
            "no marks".to_owned(),
            BEGIN.to_owned(),
            line(""),
            line("| `a` | `b` | nothing |"),
            line("| `a` | `b` | everything | any |"),
            line("| `a` | `b` | nothing | some |"),
            line("| `a` | `b` | nothing | only |"),
            line("| a | `b` | nothing | any |"),
        ] {
            assert!(parse_table(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn metadata_tells_rooms_from_outside_and_leaves_tests_out() {
        let json = r#"{"packages":[{"name":"cirri-sim","manifest_path":"/repo/crates/sim/Cargo.toml","dependencies":[
            {"name":"cirri-abi","kind":null,"path":"/repo/crates/abi"},
            {"name":"serde","kind":null},{"name":"cc","kind":"build"},{"name":"proptest","kind":"dev"}]}]}"#;
        let packages = parse_metadata(json, Path::new("/repo")).unwrap();
        assert_eq!(packages, [package("cirri-sim", "crates/sim", &["cirri-abi"], &["cc", "serde"])]);
    }
}
