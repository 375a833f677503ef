//! The bpf(2) commands that aya does not wrap, or wraps one entry at a time, and a socket option and a
//! request to namespaces that nobody wraps.
//!
//! Every function takes buffers as slices and checks their lengths against the sizes that the
//! kernel will use, which [`RawMap`] reads from the kernel itself. That is what makes them safe.

mod link;

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use cirri_abi::{Map, MapKind};

pub(crate) use link::{
    Chained, Direction, LinkInfo, chain, detach_link, link_info, link_tcx_first, link_tcx_ingress, link_xdp,
    update_link,
};

/// A map with the shape that the kernel says it has.
#[derive(Debug)]
pub(crate) struct RawMap {
    fd: OwnedFd,
    info: MapInfo,
    /// Bytes that the kernel copies for one value: per-CPU maps have one for each possible CPU.
    value_bytes: usize,
}

/// Shape of a map, from the kernel (`struct bpf_map_info`, its first 24 bytes).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

/// Where a batch lookup goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Position(Vec<u8>);

/// Entries of a batch: keys and values in a row each.
#[derive(Debug, Default)]
pub(crate) struct RawBatch {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub next: Option<Position>,
}

impl AsFd for RawMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl RawMap {
    /// A map from its descriptor.
    pub fn new(fd: OwnedFd) -> io::Result<RawMap> {
        let mut info = MapInfo::default();
        object_info(fd.as_fd(), &mut info)?;
        let per_cpu = info.kind == MapKind::PerCpuArray as u32;
        let value_bytes = if per_cpu {
            let cpus = aya::util::nr_cpus().map_err(|(path, error)| io::Error::other(format!("{path}: {error}")))?;
            (info.value_size as usize).next_multiple_of(8) * cpus
        } else {
            info.value_size as usize
        };
        Ok(RawMap { fd, info, value_bytes })
    }

    pub fn from_id(id: u32) -> io::Result<RawMap> {
        let attr = Id { id, ..Id::default() };
        // SAFETY: `attr` is the whole argument and outlives the call.
        let fd = unsafe { bpf(Command::MapGetFdById, &attr) }?;
        RawMap::new(own(fd))
    }

    /// Creates a map like this one, without a name in the file system. A map of maps takes such as `inner`.
    pub fn create(map: &Map, max_entries: u32, inner: Option<&RawMap>, name: &str) -> io::Result<RawMap> {
        let &Map { kind, key_size, value_size, flags, .. } = map;
        let inner = inner.map_or(0, RawMap::raw);
        let mut attr =
            Create { kind: kind as u32, key_size, value_size, max_entries, flags, inner, ..Create::default() };
        for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        // SAFETY: `attr` is the whole argument and outlives the call.
        let fd = unsafe { bpf(Command::MapCreate, &attr) }?;
        RawMap::new(own(fd))
    }

    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// The value under a key, `None` if there is none.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        self.check_key(key)?;
        check(value.len(), self.value_bytes)?;
        let attr = Element {
            fd: self.raw(),
            key: key.as_ptr() as u64,
            value: value.as_mut_ptr() as u64,
            ..Element::default()
        };
        // SAFETY: key and value have the sizes that the kernel copies (checked above) and outlive
        // the call; the kernel writes `value_bytes` bytes to `value`.
        absent_is_false(unsafe { bpf(Command::Lookup, &attr) })
    }

    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check_key(key)?;
        check(value.len(), self.value_bytes)?;
        self.update_unchecked(key, value.as_ptr() as u64)
    }

    /// Puts a map into a map of maps.
    pub fn update_inner(&self, key: &[u8], inner: &RawMap) -> io::Result<()> {
        self.check_key(key)?;
        check(self.value_bytes, size_of::<i32>())?;
        let fd = inner.fd.as_raw_fd();
        self.update_unchecked(key, std::ptr::from_ref(&fd) as u64)
    }

    /// Puts maps into a map of maps; on error perhaps some of them. Programs that may use the former ones are waited for
    /// once for all (before Linux 6.8 once for each; kernel commit 012772581d04).
    pub fn update_inner_batch(&self, keys: &[u8], inners: &[RawMap]) -> io::Result<()> {
        let fds: Vec<u8> = inners.iter().flat_map(|inner| inner.fd.as_raw_fd().to_ne_bytes()).collect();
        self.update_batch(keys, &fds, inners.len()).map_err(|(_, error)| error)
    }

    fn update_unchecked(&self, key: &[u8], value: u64) -> io::Result<()> {
        let attr = Element { fd: self.raw(), key: key.as_ptr() as u64, value, ..Element::default() };
        // SAFETY: both callers checked the sizes of key and value against the kernel's, and both
        // outlive the call; the kernel only reads them.
        unsafe { bpf(Command::Update, &attr) }.map(drop)
    }

    /// Whether there was such an entry.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        self.check_key(key)?;
        let attr = Element { fd: self.raw(), key: key.as_ptr() as u64, ..Element::default() };
        // SAFETY: the key has the size that the kernel reads and outlives the call.
        absent_is_false(unsafe { bpf(Command::Delete, &attr) })
    }

    /// Up to `count` entries from `from` on; more if one bucket of a hash table holds more.
    pub fn lookup_batch(&self, from: Option<&Position>, count: usize) -> io::Result<RawBatch> {
        let mut count = u32::try_from(count.max(1)).map_err(io::Error::other)?;
        // Hash tables keep a bucket's number here, the others a key.
        let position_bytes = (self.info.key_size as usize).max(size_of::<u32>());
        loop {
            let mut keys = vec![0u8; count as usize * self.info.key_size as usize];
            let mut values = vec![0u8; count as usize * self.value_bytes];
            let mut next = vec![0u8; position_bytes];
            if let Some(from) = from {
                check(from.0.len(), position_bytes)?;
            }
            let mut attr = Batch {
                from: from.map_or(0, |position| position.0.as_ptr() as u64),
                next: next.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count,
                fd: self.raw(),
                ..Batch::default()
            };
            // SAFETY: keys and values hold `count` entries of the sizes that the kernel copies,
            // the positions hold a key or a bucket number, and all of them outlive the call. The
            // kernel writes the number of entries back into `attr`, which is mutable.
            let result = unsafe { bpf_mut(Command::LookupBatch, &mut attr) };
            let last = match result {
                Ok(_) => false,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT) => true,
                    // A bucket holds more entries than there was room for.
                    Some(libc::ENOSPC) if count < 1 << 20 => {
                        count *= 4;
                        continue;
                    }
                    _ => return Err(error),
                },
            };
            let found = attr.count.min(count) as usize;
            keys.truncate(found * self.info.key_size as usize);
            values.truncate(found * self.value_bytes);
            return Ok(RawBatch { keys, values, next: (!last).then_some(Position(next)) });
        }
    }

    /// Writes all entries; on error, how many were written before it.
    pub fn update_batch(&self, keys: &[u8], values: &[u8], count: usize) -> Result<(), (usize, io::Error)> {
        let refuse = |error| (0, error);
        check(keys.len(), count * self.info.key_size as usize).map_err(refuse)?;
        check(values.len(), count * self.value_bytes).map_err(refuse)?;
        if count == 0 {
            return Ok(());
        }
        let mut attr = Batch {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: u32::try_from(count).map_err(|error| (0, io::Error::other(error)))?,
            fd: self.raw(),
            ..Batch::default()
        };
        // SAFETY: keys and values hold `count` entries of the kernel's sizes (checked above) and
        // outlive the call; the kernel only reads them, and writes the count in `attr`.
        unsafe { bpf_mut(Command::UpdateBatch, &mut attr) }
            .map(drop)
            .map_err(|error| ((attr.count as usize).min(count), error))
    }

    /// No more writes from user space, for good.
    pub fn freeze(&self) -> io::Result<()> {
        let attr = Id { id: self.raw(), ..Id::default() };
        // SAFETY: `attr` is the whole argument and outlives the call.
        unsafe { bpf(Command::Freeze, &attr) }.map(drop)
    }

    /// Kernel memory that the map takes, in bytes.
    pub fn memory(&self) -> io::Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(&path)?;
        text.lines()
            .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
            .ok_or_else(|| io::Error::other(format!("{path} has no memlock line")))
    }

    fn raw(&self) -> u32 {
        self.fd.as_raw_fd() as u32
    }

    fn check_key(&self, key: &[u8]) -> io::Result<()> {
        check(key.len(), self.info.key_size as usize)
    }
}

/// Opens a pinned map or link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = c_path(path)?;
    let attr = ObjectPath { path: name.as_ptr() as u64, ..ObjectPath::default() };
    // SAFETY: the path is a C string that outlives the call.
    unsafe { bpf(Command::ObjectGet, &attr) }.map(own)
}

fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt as _;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// The kernel's number of a map.
pub(crate) fn map_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = MapInfo::default();
    object_info(fd, &mut info)?;
    Ok(info.id)
}

/// The kernel's number of a program.
pub(crate) fn program_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = ProgramInfo::default();
    object_info(fd, &mut info)?;
    Ok(info.id)
}

/// The numbers of the maps that the program with this number works on.
pub(crate) fn program_maps(id: u32) -> io::Result<Vec<u32>> {
    let attr = Id { id, ..Id::default() };
    // SAFETY: `attr` is the whole argument and outlives the call.
    let program = own(unsafe { bpf(Command::ProgramGetFdById, &attr) }?);
    let mut counts = ProgramInfo::default();
    object_info(program.as_fd(), &mut counts)?;
    let mut maps = vec![0u32; counts.map_count as usize];
    let mut info =
        ProgramInfo { map_count: counts.map_count, maps: maps.as_mut_ptr() as u64, ..ProgramInfo::default() };
    // The kernel writes at most `map_count` numbers, the size of the vector, which outlives the call.
    object_info(program.as_fd(), &mut info)?;
    Ok(maps)
}

/// Of what kind a program that does nothing is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProbeKind {
    /// For tc.
    Classifier,
    /// For XDP.
    Xdp,
    /// For a hook of a cgroup's sockets (`enum bpf_attach_type`).
    SockAddr {
        /// The hook.
        hook: u32,
    },
}

/// Loads a program that lets everything pass.
pub(crate) fn load_probe(kind: ProbeKind) -> io::Result<OwnedFd> {
    let (kind, passes, attach_type) = match kind {
        ProbeKind::Classifier => (3, 0, 0),
        ProbeKind::Xdp => (6, 2, 0),
        ProbeKind::SockAddr { hook } => (18, 1, hook),
    };
    load_answer(kind, passes, attach_type)
}

/// Loads a classifier that answers the same whatever comes (`TCX_*`).
pub(crate) fn load_classifier(answer: i32) -> io::Result<OwnedFd> {
    load_answer(3, answer, 0)
}

fn load_answer(kind: u32, answer: i32, attach_type: u32) -> io::Result<OwnedFd> {
    let [a, b, c, d] = answer.to_ne_bytes();
    // r0 = answer; exit
    let code: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, a, b, c, d], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let attr = ProgramLoad {
        kind,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        attach_type,
        ..ProgramLoad::default()
    };
    // SAFETY: the instructions and the licence outlive the call, and the kernel reads as many
    // instructions as are said and the licence up to its end.
    unsafe { bpf(Command::ProgramLoad, &attr) }.map(own)
}

/// Keeps a link by a file on the BPF file system.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = c_path(path)?;
    let attr = ObjectPath { path: name.as_ptr() as u64, fd: fd.as_raw_fd() as u32, ..ObjectPath::default() };
    // SAFETY: the path is a C string that outlives the call.
    unsafe { bpf(Command::ObjectPin, &attr) }.map(drop)
}

/// A program's final instructions.
pub(crate) struct ProgramCode {
    /// As the kernel keeps them (`struct bpf_insn`, 8 bytes each).
    pub instructions: Vec<u8>,
    /// Bytes of machine code.
    pub jited: u32,
}

/// What the verifier made of a program.
pub(crate) fn program_code(fd: BorrowedFd<'_>) -> io::Result<ProgramCode> {
    let mut sizes = ProgramInfo::default();
    object_info(fd, &mut sizes)?;
    let mut instructions = vec![0u8; sizes.xlated_length as usize];
    let mut info = ProgramInfo {
        xlated_length: sizes.xlated_length,
        xlated: instructions.as_mut_ptr() as u64,
        ..ProgramInfo::default()
    };
    // The kernel copies at most `xlated_length` bytes, the size of the buffer, which outlives the
    // call; a program's instructions never change.
    object_info(fd, &mut info)?;
    Ok(ProgramCode { instructions, jited: sizes.jited_length })
}

/// `struct bpf_prog_info`, its first 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: u64,
    jited_length: u32,
    xlated_length: u32,
    jited: u64,
    xlated: u64,
    loaded: u64,
    user: u32,
    map_count: u32,
    maps: u64,
}

trait Info {}
impl Info for MapInfo {}
impl Info for ProgramInfo {}

fn object_info<T: Info>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr =
        InfoByFd { fd: fd.as_raw_fd() as u32, length: size_of::<T>() as u32, info: std::ptr::from_mut(info) as u64 };
    // SAFETY: the kernel writes at most `length` bytes, the size of `info`, which outlives the
    // call. Both `Info` types are integers without padding: any bytes are a valid value. It also
    // writes the length that it used to `attr`, which is mutable.
    unsafe { bpf_mut(Command::InfoByFd, &mut attr) }.map(drop)
}

fn check(actual: usize, expected: usize) -> io::Result<()> {
    if actual == expected {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{actual} bytes where the map has {expected}")))
}

fn absent_is_false(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn own(fd: i64) -> OwnedFd {
    // SAFETY: bpf(2) returned this descriptor a moment ago, so it is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

// === Sockets ===

/// The cookie of the network namespace that a socket is in (Linux 5.14).
pub(crate) fn namespace_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the cookie, its size, and the length that it
    // used; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

// === Namespaces ===

/// Whether a namespace file is a network namespace's (`ioctl_nsfs(2)`, Linux 4.11).
pub(crate) fn is_network_namespace(file: BorrowedFd<'_>) -> io::Result<bool> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: this request takes no argument and touches no memory; it answers the kind of namespace.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind == libc::CLONE_NEWNET) }
}

// === bpf(2) ===

/// `enum bpf_cmd`.
#[derive(Clone, Copy)]
enum Command {
    MapCreate = 0,
    Lookup = 1,
    Update = 2,
    Delete = 3,
    ProgramLoad = 5,
    ObjectPin = 6,
    ObjectGet = 7,
    ProgramGetFdById = 13,
    MapGetFdById = 14,
    InfoByFd = 15,
    ProgramQuery = 16,
    Freeze = 22,
    LookupBatch = 24,
    UpdateBatch = 26,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

#[repr(C)]
#[derive(Default)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// `struct bpf_attr` for loading, up to `expected_attach_type`.
#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    code: u64,
    licence: u64,
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct Element {
    fd: u32,
    _align: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ObjectPath {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Id {
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
struct InfoByFd {
    fd: u32,
    length: u32,
    info: u64,
}

/// # Safety
///
/// `attr` must be the argument of `command`, and every address in it valid for what the kernel
/// reads and writes there.
unsafe fn bpf<T>(command: Command, attr: &T) -> io::Result<i64> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attr`; the rest is the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// # Safety
///
/// As for [`bpf`]; the kernel also writes to `attr`.
unsafe fn bpf_mut<T>(command: Command, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes of `attr`; the rest is the
    // caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
