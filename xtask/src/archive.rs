//! What the package archive offers, and what of it will do. Pure: `apt` asks, this decides.

use crate::version;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Packages by name, as `apt-cache policy` knows them.
pub type Offers = BTreeMap<String, Offer>;

/// One package.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    pub installed: Option<String>,
    /// What is installed unless a version is named.
    pub candidate: Option<String>,
    /// Versions that a source has, newest first.
    pub versions: Vec<String>,
}

impl Offer {
    /// What to ask `apt-get install` for, so that a version comes that fits: the candidate, else the newest that
    /// does. `None`: there is none.
    pub fn choose(&self, name: &str, fits: impl Fn(&str) -> bool) -> Option<String> {
        if self.candidate.as_deref().is_some_and(&fits) {
            return Some(name.to_owned());
        }
        self.versions.iter().find(|version| fits(version)).map(|version| format!("{name}={version}"))
    }

    /// In words.
    fn describe(&self) -> String {
        let installed = self.installed.as_ref().map_or("not installed".to_owned(), |v| format!("{v} is installed"));
        match self.versions.as_slice() {
            [] => format!("{installed}, the archive offers none"),
            versions => format!("{installed}, the archive offers {}", versions.join(", ")),
        }
    }
}

/// Reads what `apt-cache policy NAME…` prints.
pub fn read(policy: &str) -> Offers {
    let mut offers = Offers::new();
    let mut current: Option<(String, Offer)> = None;
    // The version whose sources follow.
    let mut version: Option<&str> = None;
    for line in policy.lines() {
        if !line.starts_with(' ') {
            offers.extend(current.take());
            current = line.strip_suffix(':').map(|name| (name.to_owned(), Offer::default()));
            continue;
        }
        let Some((_, offer)) = &mut current else { continue };
        let known = |text: &str| Some(text.trim()).filter(|text| *text != "(none)").map(str::to_owned);
        if let Some(text) = line.trim().strip_prefix("Installed:") {
            offer.installed = known(text);
        } else if let Some(text) = line.trim().strip_prefix("Candidate:") {
            offer.candidate = known(text);
        } else if let Some(source) = line.strip_prefix("        ") {
            // What the package manager itself remembers of an installed package is no source of it.
            if let Some(version) = version
                && !source.trim_end().ends_with("/var/lib/dpkg/status")
                && offer.versions.last().is_none_or(|last| last != version)
            {
                offer.versions.push(version.to_owned());
            }
        } else if let Some(text) = line.strip_prefix(" *** ").or_else(|| line.strip_prefix("     ")) {
            version = text.split_whitespace().next();
        }
    }
    offers.extend(current);
    offers.values_mut().for_each(|offer| offer.versions.sort_by(|a, b| version::compare(b, a)));
    offers
}

/// A compiler in the archive with the source of its own library: three packages of one version.
pub struct Family {
    pub rustc: &'static str,
    pub cargo: &'static str,
    pub source: &'static str,
    /// Its library's package is called so and the release, as `libstd-rust-web-1.96`. That one names the LLVM.
    pub library: &'static str,
}

impl Family {
    pub const ALL: [Family; 2] = [
        // What Debian's browsers are built with: newer than the release's own.
        Family { rustc: "rustc-web", cargo: "cargo-web", source: "rust-web-src", library: "libstd-rust-web-" },
        Family { rustc: "rustc", cargo: "cargo", source: "rust-src", library: "libstd-rust-" },
    ];

    pub fn packages(&self) -> [&'static str; 3] {
        [self.rustc, self.cargo, self.source]
    }

    /// The package that depends on the LLVM of this version.
    pub fn library_of(&self, version: &str) -> String {
        let mut numbers = version::upstream(version).split('.');
        let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        format!("{}{major}.{minor}", self.library)
    }
}

/// What the BPF programs need of their compiler.
pub struct CompilerNeeds<'a> {
    /// The release, as in the workspace's `rust-version`.
    pub least: &'a str,
    /// Its LLVM.
    pub llvm: RangeInclusive<u32>,
}

impl CompilerNeeds<'_> {
    /// Why a compiler will not do. `Ok`: it will.
    pub fn judge(&self, release: &str, llvm: u32) -> Result<(), String> {
        if !version::at_least(release, self.least) {
            return Err(format!("older than {}", self.least));
        }
        if !self.llvm.contains(&llvm) {
            return Err(format!("its LLVM {llvm} is not {}", self.llvms()));
        }
        Ok(())
    }

    /// In words.
    pub fn describe(&self) -> String {
        format!("{} or newer, with LLVM {}", self.least, self.llvms())
    }

    fn llvms(&self) -> String {
        format!("{} to {}", self.llvm.start(), self.llvm.end())
    }
}

/// A compiler that will do.
#[derive(Debug, PartialEq, Eq)]
pub struct Compiler {
    /// For `apt-get install`.
    pub arguments: Vec<String>,
    pub llvm: u32,
}

/// The newest compiler in the archive that will do, of which the archive also has the LLVM. `llvm_of` answers the LLVM
/// that a library's package depends on. Else what there is, a line each.
pub fn choose_compiler(
    offers: &Offers,
    needs: &CompilerNeeds<'_>,
    llvm_of: impl Fn(&str) -> Option<u32>,
) -> Result<Compiler, Vec<String>> {
    let nothing = Offer::default();
    let of = |name: &str| offers.get(name).unwrap_or(&nothing);
    let mut found = Vec::new();
    for family in &Family::ALL {
        let compiler = of(family.rustc);
        for version in &compiler.versions {
            let llvm = llvm_of(&family.library_of(version));
            let judged = needs.judge(version::upstream(version), llvm.unwrap_or(*needs.llvm.end()));
            let lacking = family.packages().into_iter().find(|name| !of(name).versions.contains(version));
            let problem = match (judged, lacking, llvm) {
                (Err(problem), _, _) => problem,
                (Ok(()), Some(lacking), _) => format!("without a {lacking} of this version"),
                (Ok(()), None, None) => "what its LLVM is cannot be told".to_owned(),
                (Ok(()), None, Some(llvm)) => {
                    let exactly = |name| of(name).choose(name, |offered| offered == version);
                    let arguments = family.packages().into_iter().filter_map(exactly).collect();
                    return Ok(Compiler { arguments, llvm });
                }
            };
            found.push(format!("{} {version}: {problem}", family.rustc));
        }
    }
    if found.is_empty() {
        found.push("the archive offers none".to_owned());
    }
    Err(found)
}

/// Something that cannot be had as it is needed.
#[derive(Debug, PartialEq, Eq)]
pub struct Shortage {
    pub what: String,
    /// The version, or an empty text if any will do.
    pub needs: String,
    /// What there is instead, a line each.
    pub found: Vec<String>,
}

impl Shortage {
    /// A package of which no version will do.
    pub fn of(name: &str, least: Option<&str>, offer: &Offer) -> Self {
        let needs = least.map_or(String::new(), |least| format!("{least} or newer"));
        Self { what: name.to_owned(), needs, found: vec![offer.describe()] }
    }
}

/// All that is lacking: what was found, what is needed, and what to type.
pub fn explain(shortages: &[Shortage], refreshed: bool, typed: &[String]) -> String {
    let mut text = String::from("this cannot be installed in a version that will do:");
    for Shortage { what, needs, found } in shortages {
        let needs = if needs.is_empty() { String::new() } else { format!(", needed: {needs}") };
        text += &format!("\n  {what}{needs}");
        found.iter().for_each(|line| text += &format!("\n    found: {line}"));
    }
    text += match refreshed {
        true => "\nThe package index was refreshed just now.",
        false => "\nThe package index could not be refreshed (see above): mend that first, `apt-get update` tries it.",
    };
    if !typed.is_empty() {
        text += &format!("\nWhat to type:\n  {}", typed.join("\n  "));
    }
    text
}

/// The LLVM that a package depends on, from what `apt-cache show` says of it.
pub fn llvm_in(description: &str) -> Option<u32> {
    let depends = description.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    depends.split(',').find_map(|one| {
        let name = one.split_whitespace().next()?;
        name.split(':').next()?.strip_prefix("libllvm")?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "\
rustc-web:
  Installed: 1.85.0+dfsg3-1~deb12u3
  Candidate: 1.96.0+dfsg1-1~deb12u2
  Version table:
     1.96.0+dfsg1-1~deb12u2 500
        500 https://archive.test/security bookworm-security/main amd64 Packages
 *** 1.85.0+dfsg3-1~deb12u3 500
        500 https://archive.test/debian bookworm/main amd64 Packages
        100 /var/lib/dpkg/status
dpkg:
  Installed: 1.21.22
  Candidate: 1.21.22
  Version table:
 *** 1.21.22 100
        100 /var/lib/dpkg/status
gone:
  Installed: (none)
  Candidate: (none)
  Version table:
";

    const NEEDS: CompilerNeeds<'static> = CompilerNeeds { least: "1.95", llvm: 21..=23 };

    fn offer(installed: Option<&str>, candidate: Option<&str>, versions: &[&str]) -> Offer {
        let text = |text: &str| text.to_owned();
        Offer {
            installed: installed.map(text),
            candidate: candidate.map(text),
            versions: versions.iter().map(|version| text(version)).collect(),
        }
    }

    fn compilers(family: &Family, versions: &[&str]) -> Offers {
        let offer = offer(None, versions.first().copied(), versions);
        family.packages().map(|name| (name.to_owned(), offer.clone())).into()
    }

    /// LLVM 19 for 1.85, 22 for 1.96, and so on.
    fn llvm_of(library: &str) -> Option<u32> {
        let minor: u32 = library.rsplit_once('.')?.1.parse().ok()?;
        Some(minor.saturating_sub(85) / 4 + 19 + u32::from(minor > 95))
    }

    #[test]
    fn a_policy_is_read_with_versions_that_a_source_has() {
        let offers = read(POLICY);
        let (old, new) = ("1.85.0+dfsg3-1~deb12u3", "1.96.0+dfsg1-1~deb12u2");
        assert_eq!(offers["rustc-web"], offer(Some(old), Some(new), &[new, old]));
        assert_eq!(offers["dpkg"], offer(Some("1.21.22"), Some("1.21.22"), &[]));
        assert_eq!((&offers["gone"], offers.len()), (&Offer::default(), 3));
    }

    #[test]
    fn the_candidate_is_taken_if_it_fits_else_the_newest_that_does_by_its_version() {
        let both = offer(None, Some("2.0-1"), &["3.0-1", "2.0-1", "1.0-1"]);
        let choose = |least: &str| both.choose("x", |version| version::at_least(version, least));
        assert_eq!(choose("1.5").as_deref(), Some("x"));
        assert_eq!(choose("2.5").as_deref(), Some("x=3.0-1"), "a preference for the older one does not help");
        assert_eq!(choose("3.5"), None);
    }

    #[test]
    fn a_compiler_that_is_offered_but_too_old_is_not_taken_and_named() {
        let stale = compilers(&Family::ALL[0], &["1.85.0+dfsg3-1~deb12u3"]);
        let found = choose_compiler(&stale, &NEEDS, llvm_of).unwrap_err();
        assert_eq!(found, ["rustc-web 1.85.0+dfsg3-1~deb12u3: older than 1.95"]);
        let text = explain(
            &[Shortage { what: "a Rust compiler".into(), needs: NEEDS.describe(), found }],
            true,
            &["rustup component add rust-src".into()],
        );
        for part in ["1.85.0+dfsg3", "needed: 1.95 or newer, with LLVM 21 to 23", "refreshed", "rustup component add"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn after_a_refresh_the_newer_compiler_is_taken_with_its_llvm() {
        let fresh = compilers(&Family::ALL[0], &["1.96.0+dfsg1-1~deb12u2", "1.85.0+dfsg3-1~deb12u3"]);
        let chosen = choose_compiler(&fresh, &NEEDS, llvm_of).unwrap();
        assert_eq!(chosen, Compiler { arguments: Family::ALL[0].packages().map(str::to_owned).into(), llvm: 22 });
        // Somebody's preference for the older one is not what the build needs.
        let mut pinned = fresh.clone();
        pinned.values_mut().for_each(|offer| offer.candidate = offer.versions.last().cloned());
        let chosen = choose_compiler(&pinned, &NEEDS, llvm_of).unwrap();
        assert_eq!(chosen.arguments[0], "rustc-web=1.96.0+dfsg1-1~deb12u2");
        // A release whose own compiler is new enough needs no other.
        let own = compilers(&Family::ALL[1], &["1.97.0+dfsg1-1"]);
        assert_eq!(choose_compiler(&own, &NEEDS, llvm_of).unwrap().arguments, ["rustc", "cargo", "rust-src"]);
    }

    #[test]
    fn a_compiler_without_its_source_or_with_an_llvm_that_will_not_do_is_passed_over() {
        let version = "1.96.0-1";
        let mut offers = compilers(&Family::ALL[0], &[version]);
        offers.get_mut("rust-web-src").unwrap().versions = vec!["1.85.0-1".into()];
        let found = choose_compiler(&offers, &NEEDS, llvm_of).unwrap_err();
        assert_eq!(found, ["rustc-web 1.96.0-1: without a rust-web-src of this version"]);
        let offers = compilers(&Family::ALL[0], &[version]);
        let found = choose_compiler(&offers, &NEEDS, |_| Some(24)).unwrap_err();
        assert_eq!(found, ["rustc-web 1.96.0-1: its LLVM 24 is not 21 to 23"]);
        assert_eq!(choose_compiler(&Offers::new(), &NEEDS, llvm_of).unwrap_err(), ["the archive offers none"]);
    }

    #[test]
    fn a_compilers_llvm_is_read_from_what_its_library_depends_on() {
        let family = &Family::ALL[0];
        assert_eq!(family.library_of("1.96.0+dfsg1-1~deb12u2"), "libstd-rust-web-1.96");
        let text = "Package: libstd-rust-web-1.96\nDepends: libc6 (>= 2.34), libllvm22, libstdc++6 (>= 11)\n";
        assert_eq!(llvm_in(text), Some(22));
        assert_eq!(llvm_in("Depends: libllvm19:amd64 (>= 1:19)\n"), Some(19));
        assert_eq!(llvm_in("Depends: libc6\n"), None);
    }
}
