//! Network namespaces: entering, naming, removing.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, fstat, fstatfs, open},
    io::Errno,
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount},
    net::{AddressFamily, SocketType},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use super::NetError;
use crate::sys;

/// A network namespace, kept alive as long as this is.
///
/// Nothing changes the namespace of the caller's thread: code that must run inside gets a thread of
/// its own.
#[derive(Clone, Debug)]
pub struct Namespace {
    file: Arc<File>,
    path: PathBuf,
}

/// Where named namespaces stand, as iproute2 has it.
const NAMED: &str = "/run/netns";

impl Namespace {
    /// That of the calling thread.
    pub fn current() -> Result<Namespace, NetError> {
        Namespace::open("/proc/thread-self/ns/net")
    }

    /// That of the machine's first process (as far as `/proc` shows it): its own network, whatever
    /// namespace the caller is in.
    pub fn of_init() -> Result<Namespace, NetError> {
        Namespace::open("/proc/1/ns/net")
    }

    /// One that a file stands for: `/run/netns/NAME`, `/proc/PID/ns/net`.
    ///
    /// The path may be anybody's choice: whatever it is, opening it waits for nothing and touches nothing.
    pub fn open(path: impl AsRef<Path>) -> Result<Namespace, NetError> {
        let path = path.as_ref();
        let failed = |error| NetError::Namespace { path: path.into(), action: "open", error };
        let other = || failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no network namespace"));
        // A pipe would wait for its writer, a device might act: only what is a namespace is really opened.
        let place = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|error| failed(error.into()))?;
        if !is_namespace(&place) {
            return Err(other());
        }
        let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd())).map_err(failed)?;
        if !sys::is_network_namespace(file.as_fd()).map_err(failed)? {
            return Err(other());
        }
        Ok(Namespace { file: Arc::new(file), path: path.into() })
    }

    /// Whether both are one namespace, however they were found: by the kernel's object, not by the path.
    pub fn is_same(&self, other: &Namespace) -> Result<bool, NetError> {
        let identity = |namespace: &Namespace| {
            let stat = fstat(&namespace.file).map_err(|error| namespace.failed("look at", error.into()))?;
            Ok((stat.st_dev, stat.st_ino))
        };
        Ok(identity(self)? == identity(other)?)
    }

    /// The path of a named namespace.
    pub fn path_of(name: &str) -> PathBuf {
        Path::new(NAMED).join(name)
    }

    /// A namespace with a name, made if it is not there. In a new one even `lo` is down.
    pub fn create(name: &str) -> Result<Namespace, NetError> {
        let path = Namespace::path_of(name);
        if let Ok(there) = Namespace::open(&path) {
            return Ok(there);
        }
        // A file without a mount is what a crash between the two steps leaves; it is used again.
        Namespace::make(name, File::options().create(true).truncate(false).write(true))
    }

    /// A namespace with a name that nobody has yet, not even a file that a crash left. In it even `lo` is down.
    pub fn create_new(name: &str) -> Result<Namespace, NetError> {
        Namespace::make(name, File::options().create_new(true).write(true))
    }

    /// Opens the name's file in this way and mounts a new namespace on it.
    fn make(name: &str, file: &fs::OpenOptions) -> Result<Namespace, NetError> {
        let path = Namespace::path_of(name);
        let failed = |action| {
            let path = path.clone();
            move |error| NetError::Namespace { path, action, error }
        };
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(failed("create")(io::Error::new(io::ErrorKind::InvalidInput, "it is no good name")));
        }
        share_directory().map_err(failed("make the directory a shared mount for"))?;
        file.open(&path).map_err(failed("create"))?;
        on_own_thread(|| {
            // SAFETY: only NEWNET is unshared, which concerns this thread's sockets to be and
            // nothing that another thread could observe; descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            mount_bind("/proc/thread-self/ns/net", &path)
        })
        .map_err(|error| failed("create")(error.into()))?;
        Namespace::open(&path)
    }

    /// Removes a name, and with it the namespace once no process or file holds it. Whether there
    /// was one.
    pub fn delete(name: &str) -> Result<bool, NetError> {
        let path = Namespace::path_of(name);
        let failed = |action, error| NetError::Namespace { path: path.clone(), action, error };
        // Not mounted or not there: the file alone is left, or nothing.
        unmount_all(&path).map_err(|error| failed("unmount", error.into()))?;
        let mut removed = fs::remove_file(&path);
        if removed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
            removed = remove_hidden(&path);
        }
        match removed {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("remove", error)),
        }
    }

    /// What it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for handing the namespace to the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The number by which packet programs know it: unique while the machine runs. Needs Linux 5.14.
    pub fn cookie(&self) -> Result<u64, NetError> {
        let asked = self.run(|| {
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            sys::namespace_cookie(socket.as_fd())
        })?;
        asked.map_err(|error| self.failed("ask the cookie of", error))
    }

    /// Runs code inside, on a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        on_own_thread(|| self.enter().map(|()| inside()))
    }

    /// The same for code that may run on any thread: on the calling one, if that is inside already. Making a thread
    /// costs more than what is done there.
    pub(super) fn run_anywhere<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let identity = |file: fs::Metadata| (file.dev(), file.ino());
        let ours = self.file.metadata().map(identity).ok();
        let is_inside = ours.is_some() && fs::metadata("/proc/thread-self/ns/net").map(identity).ok() == ours;
        if is_inside { Ok(inside()) } else { self.run(inside) }
    }

    /// Runs asynchronous code inside, on a thread and a runtime of its own. Dropping the future
    /// does not stop it.
    pub async fn run_async<T, F, A>(&self, inside: F) -> Result<T, NetError>
    where
        T: Send + 'static,
        F: FnOnce() -> A + Send + 'static,
        A: Future<Output = T>,
    {
        let (done, result) = tokio::sync::oneshot::channel();
        let here = self.clone();
        let body = move || {
            let run = || {
                here.enter()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|error| here.failed("start a runtime in", error))?;
                Ok(runtime.block_on(inside()))
            };
            // Nobody listens any more if the caller gave up; that is its right.
            let _ = done.send(run());
        };
        let spawned = thread::Builder::new().name("netns".into()).spawn(body);
        spawned.map_err(|error| self.failed("start a thread for", error))?;
        match result.await {
            Ok(result) => result,
            Err(_) => Err(self.failed("run in", io::Error::other("the code in it panicked"))),
        }
    }

    /// Moves this thread inside, for good. Only for threads that were made for it.
    fn enter(&self) -> Result<(), NetError> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| self.failed("enter", error.into()))
    }

    fn failed(&self, action: &'static str, error: io::Error) -> NetError {
        NetError::Namespace { path: self.path.clone(), action, error }
    }
}

/// Runs code in the network namespace that a file stands for; see [`Namespace::run`].
pub fn in_netns<T: Send>(path: impl AsRef<Path>, inside: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    Namespace::open(path)?.run(inside)
}

/// Makes the directory of names a shared mount, as iproute2 does before it mounts a namespace there.
///
/// Whoever comes first binds the directory over itself. A namespace that was mounted before that lies
/// under the new mount and cannot be unmounted by its path any more: so we must not leave that step
/// to the first `ip netns add`.
fn share_directory() -> io::Result<()> {
    fs::create_dir_all(NAMED)?;
    let directory = File::open(NAMED)?;
    // iproute2 takes the same lock: two that bind at once would do it twice. Gone with the file.
    flock(&directory, FlockOperation::LockExclusive)?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    match mount_change(NAMED, shared) {
        // It is no mount yet.
        Err(Errno::INVAL) => mount_bind_recursive(NAMED, NAMED).and_then(|()| mount_change(NAMED, shared)),
        other => other,
    }
    .map_err(io::Error::from)
}

/// Takes off what is mounted at a path, however often. Nothing there is no error.
fn unmount_all(path: &Path) -> Result<(), Errno> {
    loop {
        match unmount(path, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Removes a name whose namespace is mounted where no path leads any more, under a directory that was
/// bound over itself later. The kernel refuses to remove what is a mount point in the caller's own
/// mount namespace; in others the mount goes with the name. So it is done from a copy of ours in
/// which everything above it is taken off.
fn remove_hidden(path: &Path) -> io::Result<()> {
    on_own_thread(|| {
        // SAFETY: the thread is made for this and ends with it; a mount namespace and the working
        // directory of its own concern no other thread, descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        // Nothing that is done here may reach the mount namespace it was copied from.
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        unmount_all(Path::new(NAMED))?;
        unmount_all(path)?;
        fs::remove_file(path)
    })
}

fn on_own_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(body).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn is_namespace(file: impl AsFd) -> bool {
    const NSFS: u32 = 0x6e73_6673;
    fstatfs(file).is_ok_and(|fs| fs.f_type as u32 == NSFS)
}
