//! `cirri bench pin` and `unpin`: programs and tables of a case for a harness from outside. How to
//! use them: `docs/bench/pin.md`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cirri_loader::{Datapath, LoadOptions};
use serde::Serialize;

use super::cases::{self, Case, Kind};
use super::ground::Ground;
use super::packets::{self, Stage};

/// Connections that are there.
const FLOWS: u16 = 16_384;
const INSTANCE: &str = "maps";

/// What a harness needs.
#[derive(Clone, Debug, Serialize)]
pub struct Pinned {
    case: &'static str,
    about: &'static str,
    /// The program under test.
    program: PathBuf,
    /// An empty program, loaded beside it.
    floor: PathBuf,
    /// What kind of programs these are: `tc`, `xdp`.
    hook: &'static str,
    /// Where the maps are pinned, by name.
    maps: PathBuf,
    /// Run the harness with `nsenter --net=` this.
    netns: PathBuf,
    /// The device that packets are met on, in that namespace.
    ifindex: u32,
    /// The mark that packets must have.
    mark: u32,
    /// Flow 0 over IPv4: source port 10000; flow `n` differs in the source port alone, 10000 + n.
    packet4: String,
    /// The same over IPv6.
    packet6: Option<String>,
    /// Connections of each family that are there; 0 if the case has first packets.
    flows: u16,
}

/// Loads, fills and pins.
pub fn pin(name: &str, dir: &Path, others: Option<u32>) -> Result<Pinned> {
    let Some(case) = cases::find(name) else {
        let names: Vec<_> = cases::ALL.iter().map(|case| case.name).collect();
        bail!("there is no case {name}; there are {}", names.join(", "));
    };
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} is not empty: `cirri bench unpin {}` first", dir.display(), dir.display());
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut ground = Ground::new(&namespace_of(dir))?;
    let namespace = ground.namespace.clone();
    let pinned = namespace.run(|| fill_and_pin(case, dir, &ground, others)).map_err(anyhow::Error::from);
    match pinned.and_then(|pinned| pinned) {
        Ok(pinned) => {
            ground.keep();
            Ok(pinned)
        }
        Err(error) => {
            // The error is what matters; what is left goes with `unpin`.
            let _ = remove_pins(dir);
            Err(error)
        }
    }
}

/// Removes what [`pin`] made. Nothing of it being there is no error.
pub fn unpin(dir: &Path) -> Result<()> {
    remove_pins(dir)?;
    Ground::remove(&namespace_of(dir))?;
    Ok(())
}

fn fill_and_pin(case: &'static Case, dir: &Path, ground: &Ground, others: Option<u32>) -> Result<Pinned> {
    let options = LoadOptions { pin_root: dir.to_owned(), instance: INSTANCE.to_owned(), ..LoadOptions::default() };
    let mut datapath = Datapath::load(&options)?;
    let tables = datapath.tables().clone();
    ground.fill(&tables, case.routing)?;
    let v6 = case.has_v6().then_some(true);
    let mut packets = Vec::new();
    let mut leg = None;
    let opener = cases::find(case.opener_case()).unwrap_or(case);
    let mut stage = Stage { trial: datapath.trial()?, tables: tables.clone() };
    if let Some(others) = others {
        packets::let_others_through(&tables, others)?;
    }
    for v6 in [Some(false), v6].into_iter().flatten() {
        let answer = match case.lane {
            _ if !case.established() => None,
            None => Some(case.establish(&mut stage.trial, ground, v6, FLOWS)?),
            Some(_) => opener.open(&mut stage, ground, v6, FLOWS.into())?,
        };
        let measured = case.measured(ground, v6, answer.as_ref());
        packets.push(hex(&measured.packet));
        leg = Some(measured.leg);
    }
    drop(stage);
    if matches!(case.kind, Kind::New | Kind::Dropped) {
        ground.allow_any_source(&tables)?;
    }
    let leg = leg.context("a case without packets")?;
    let edge = leg.program == "edge";
    let pin_program = |datapath: &mut Datapath, name: &str| -> Result<PathBuf> {
        let path = dir.join(format!("prog_{name}"));
        datapath.pin_program(name, &path)?;
        Ok(path)
    };
    let mut packets = packets.into_iter();
    Ok(Pinned {
        case: case.name,
        about: case.about,
        program: pin_program(&mut datapath, leg.program)?,
        floor: pin_program(&mut datapath, if edge { "floor_edge" } else { "floor" })?,
        hook: if edge { "xdp" } else { "tc" },
        maps: dir.join(INSTANCE).join(format!("{:016x}", cirri_abi::ABI_HASH)),
        netns: ground.path(),
        ifindex: leg.ifindex,
        mark: leg.mark,
        packet4: packets.next().unwrap_or_default(),
        packet6: packets.next(),
        flows: if case.established() { FLOWS } else { 0 },
    })
}

/// What to print for people: the harness's command line.
pub fn shown(pinned: &Pinned) -> String {
    let Pinned { program, floor, maps, netns, ifindex, packet4, .. } = pinned;
    let flows = if pinned.flows > 0 { 16_384 } else { -1 };
    let line = |label: &str, pin: &Path, flows: i64| {
        format!("{label},pin={},wrap={},if={ifindex},flows={flows},pkt={packet4}", pin.display(), pinned.hook)
    };
    format!(
        "{}: {}\nprogram {}\nfloor   {}\nmaps    {}\nnetns   {}\nifindex {ifindex}, mark {}\nIPv4    {packet4}\nIPv6    {}\n\n\
         nsenter --net={} bpfbench -c 1 -n 20000 -r 41 \\\n  {} \\\n  {} \\\n  {}\n",
        pinned.case,
        pinned.about,
        program.display(),
        floor.display(),
        maps.display(),
        netns.display(),
        pinned.mark,
        pinned.packet6.as_deref().unwrap_or("-"),
        netns.display(),
        line("floor", floor, 0),
        line(pinned.case, program, if pinned.flows > 0 { 0 } else { -1 }),
        line(&format!("{}-many", pinned.case), program, flows),
    )
}

fn remove_pins(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    Datapath::purge(dir, INSTANCE)?;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("prog_") {
            fs::remove_file(entry.path()).with_context(|| format!("cannot unpin {}", entry.path().display()))?;
        }
    }
    fs::remove_dir(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// A name of its own for each directory.
fn namespace_of(dir: &Path) -> String {
    let hash = dir
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("pin-{:08x}", hash as u32)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
