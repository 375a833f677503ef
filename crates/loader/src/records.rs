//! Small texts that the kernel keeps as long as its network: what a file on a disk may lose.
//!
//! A text is the one value of an array that is pinned under a number. Nobody can write to it any more.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use cirri_abi::{Map, MapKind};

use crate::{
    error::LoadError,
    pins::{Pins, at, create},
    sys::{self, RawMap},
};

/// The only key.
const KEY: [u8; 4] = [0; 4];
/// Longest text, bytes; what is longer was not written here.
const LONGEST: u32 = 1 << 20;
/// What such an array is, but for the length of its value.
const RECORD: Map = Map {
    name: "record",
    kind: MapKind::Array,
    key_size: KEY.len() as u32,
    value_size: 0,
    max_entries: 1,
    flags: 0,
    about: "a text that the kernel keeps",
};

/// A text, or why it cannot be read.
type Text = Result<Vec<u8>, LoadError>;

/// The texts about an instance's endpoints, by number. They end with the instance's pins, or with the machine.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Those of an instance, of which there may be none yet.
    pub fn of(pin_root: &Path, instance: &str) -> Records {
        Records { dir: Pins::endpoints(&pin_root.join(instance)) }
    }

    /// Where a text is pinned.
    pub fn path(&self, number: u16) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Keeps a text in the place of an earlier one: a reader finds the one or the other.
    ///
    /// # Errors
    /// The kernel makes no map, or the pin's.
    pub fn write(&self, number: u16, text: &[u8]) -> Result<(), LoadError> {
        let path = self.path(number);
        let fresh = self.dir.join(format!("{number}-new"));
        let map = made(text).map_err(at(&path, "make a record"))?;
        create(&self.dir)?;
        // What a crash left half way.
        remove(&fresh)?;
        sys::pin(map.as_fd(), &fresh).map_err(at(&fresh, "pin"))?;
        fs::rename(&fresh, &path).map_err(at(&path, "put in place"))
    }

    /// Every text that is kept, or why it cannot be read.
    ///
    /// # Errors
    /// The directory's. That there is none is no error.
    pub fn read_all(&self) -> Result<Vec<(u16, Text)>, LoadError> {
        let listed = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(at(&self.dir, "list"))?,
        };
        let mut all = Vec::new();
        for entry in listed {
            let path = entry.map_err(at(&self.dir, "list"))?.path();
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(number) = number {
                all.push((number, read(&path).map_err(at(&path, "read"))));
            }
        }
        Ok(all)
    }

    /// Keeps it no longer; it may be gone already.
    ///
    /// # Errors
    /// The pin's.
    pub fn remove(&self, number: u16) -> Result<(), LoadError> {
        remove(&self.path(number))
    }
}

fn made(text: &[u8]) -> io::Result<RawMap> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} bytes are too many", text.len()));
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= LONGEST).ok_or_else(too_long)?;
    let map = RawMap::create(&Map { value_size: length, ..RECORD }, 1, None, RECORD.name)?;
    map.update(&KEY, text)?;
    map.freeze()?;
    Ok(map)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let map = RawMap::new(sys::open_pin(path)?)?;
    let info = map.info();
    let is_record = info.kind == RECORD.kind as u32
        && (info.key_size, info.max_entries) == (RECORD.key_size, RECORD.max_entries)
        && info.value_size <= LONGEST;
    if !is_record {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no record"));
    }
    let mut text = vec![0; map.value_bytes()];
    map.lookup(&KEY, &mut text)?;
    Ok(text)
}

fn remove(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path, "remove")(error)),
        _ => Ok(()),
    }
}
