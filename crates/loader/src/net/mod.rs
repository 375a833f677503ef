//! Devices, addresses, routes, neighbours and namespaces, over netlink.
//!
//! Every operation is idempotent: what is there already as it should be is left alone, what is gone
//! already is no error. Errors name the object and the namespace.

mod filter;
mod foreign;
mod link;
mod lookup;
mod namespace;
mod netconf;
mod news;
mod route;
mod rule;
mod settings;
pub mod sockets;
mod watch;
mod wire;
mod xdp;

use std::{io, net::IpAddr, os::fd::OwnedFd, path::PathBuf};

use rtnetlink::{packet_route::RouteNetlinkMessage, sys::protocols::NETLINK_ROUTE};
use rustix::net::{AddressFamily, SocketType};

pub(crate) use filter::{Filter, delete_clsact, delete_filter, filters_on, put_filter};
pub use foreign::ForeignRoute;
pub(crate) use link::devices;
pub use link::{Link, VethEnd, Vxlan};
pub use lookup::{Asked, Lookup, Rules, Selector, lookup, rules};
pub use namespace::{Namespace, in_netns};
pub use netconf::DeviceSettings;
pub use news::{Changed, NetworkChange, NetworkNews, Watched};
pub use route::{Address, ListedRoute, MAIN_TABLE, Neighbour, ROUTE_PROTOCOL, Route};
pub use rule::SourceRoute;
pub use settings::OpenSettings;
pub use watch::{DeviceNews, ForeignRoutes, NamespaceNews, NeighbourChange, Neighbours};
pub(crate) use xdp::xdp_on;

/// The network of one namespace. Cheap to clone.
///
/// Its netlink socket stays in the namespace it was opened in, whatever thread uses it later.
#[derive(Clone, Debug)]
pub struct Net {
    handle: rtnetlink::Handle,
    namespace: Namespace,
}

/// A network operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel refused a change or a question.
    #[error("{object} in {namespace}: {action}: {error}", namespace = .namespace.display())]
    Kernel {
        /// The namespace's file.
        namespace: PathBuf,
        /// The device, address, route or setting.
        object: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// The kernel was built without something, and goes on without it.
    #[error("{what} in {namespace}: {error}; {hint}", namespace = .namespace.display())]
    Unsupported {
        /// The namespace's file.
        namespace: PathBuf,
        /// What cannot be done.
        what: &'static str,
        /// What it needs, and what happens without.
        hint: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// There is no such device.
    #[error("there is no device {link} in {namespace}", namespace = .namespace.display())]
    NoLink {
        /// The namespace's file.
        namespace: PathBuf,
        /// Name or number.
        link: String,
    },
    /// A namespace could not be used.
    #[error("network namespace {path}: cannot {action} it: {error}", path = .path.display())]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

impl Net {
    /// The network of the calling thread's namespace. Must be called on a tokio runtime.
    pub fn here() -> Result<Net, NetError> {
        Net::of(Namespace::current()?)
    }

    /// The network of any namespace. Must be called on a tokio runtime; the caller's thread stays
    /// where it is.
    pub fn of(namespace: Namespace) -> Result<Net, NetError> {
        let runtime = tokio::runtime::Handle::current();
        let opened = namespace.run(|| {
            let _registers_here = runtime.enter();
            rtnetlink::new_connection()
        })?;
        let (connection, handle, _) = opened.map_err(|error| NetError::Namespace {
            path: namespace.path().into(),
            action: "open netlink in",
            error,
        })?;
        // Ends by itself when the last handle is dropped.
        runtime.spawn(connection);
        Ok(Net { handle, namespace })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Writes a setting below `/proc/sys/net` of this namespace: `ipv4/conf/eth0/rp_filter`.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<(), NetError> {
        let path = settings::path(name);
        let done = self.namespace.run(|| {
            // Writing some settings has effects even if the value is the same, so it is read first.
            match read_setting(&path) {
                Ok(now) if now == value.trim() => Ok(()),
                _ => std::fs::write(&path, value),
            }
        })?;
        done.map_err(|error| self.failed(format!("setting {name}={value}"), "write", error))
    }

    /// Reads such a setting.
    pub fn sysctl(&self, name: &str) -> Result<String, NetError> {
        let path = settings::path(name);
        let read = self.namespace.run_anywhere(|| read_setting(&path))?;
        read.map_err(|error| self.failed(format!("setting {name}"), "read", error))
    }

    /// Reads many of them at once; `None` for one that is not there.
    pub fn sysctls<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Option<String>>, NetError> {
        let paths: Vec<String> = names.into_iter().map(settings::path).collect();
        self.namespace.run_anywhere(|| paths.iter().map(|path| read_setting(path).ok()).collect())
    }

    /// The settings of one name of every device (and of `all` and `default`): `ipv4/conf/*/forwarding`.
    pub fn sysctl_names(&self, directory: &str, name: &str) -> Result<Vec<String>, NetError> {
        let path = settings::path(directory);
        let listed = self.namespace.run(|| {
            let entries = std::fs::read_dir(&path)?;
            Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>())
        })?;
        let mut devices = listed.map_err(|error| self.failed(format!("settings {directory}"), "list", error))?;
        devices.sort();
        Ok(devices.into_iter().map(|device| format!("{directory}/{device}/{name}")).collect())
    }

    /// The number of a device.
    pub fn device_number(&self, device: &str) -> Result<u32, NetError> {
        let asked = self.namespace.run(|| Ok(rustix::net::netdevice::name_to_index(probe()?, device)?))?;
        asked.map_err(|error| self.failed(format!("device {device}"), "look up", error))
    }

    /// The name of a device, `None` if there is no such device.
    pub fn device_name(&self, index: u32) -> Result<Option<String>, NetError> {
        let asked = self.namespace.run(|| Ok(rustix::net::netdevice::index_to_name(probe()?, index)?))?;
        match asked {
            Ok(name) => Ok(Some(name)),
            Err(error) if [libc::ENODEV, libc::ENXIO].map(Some).contains(&io::Error::raw_os_error(&error)) => Ok(None),
            Err(error) => Err(self.failed(format!("device {index}"), "look up", error)),
        }
    }

    /// All objects that a request asks for, as they were at one time.
    fn list<T>(
        &self,
        object: &str,
        request: RouteNetlinkMessage,
        scope: wire::Scope,
        pick: fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetError> {
        let answers = self.namespace.run_anywhere(|| wire::ask(NETLINK_ROUTE, request, scope))?;
        let answers = answers.map_err(|error| self.failed(object, "list", error))?;
        Ok(answers.into_iter().filter_map(pick).collect())
    }

    fn failed(&self, object: impl Into<String>, action: &'static str, error: io::Error) -> NetError {
        NetError::Kernel { namespace: self.namespace.path().into(), object: object.into(), action, error }
    }

    /// Turns what rtnetlink answers into an error that names the object.
    fn checked<T>(
        &self,
        object: impl FnOnce() -> String,
        action: &'static str,
        result: Result<T, rtnetlink::Error>,
    ) -> Result<T, NetError> {
        result.map_err(|error| self.failed(object(), action, kernel(error)))
    }
}

fn read_setting(path: &str) -> io::Result<String> {
    std::fs::File::open(path).and_then(|file| settings::read(&file))
}

/// A socket to ask about devices by. It needs no port: a machine may have none left.
pub(crate) fn probe() -> io::Result<OwnedFd> {
    let socket = |family| rustix::net::socket(family, SocketType::DGRAM, None);
    Ok(socket(AddressFamily::INET).or_else(|_| socket(AddressFamily::INET6))?)
}

/// The kernel's error number, if it is one.
fn kernel(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The answer to a removal: whether there was something to remove.
fn absent_is_false(result: Result<(), rtnetlink::Error>) -> Result<bool, io::Error> {
    const ABSENT: [i32; 4] = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL];
    match result.map_err(kernel) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error().is_some_and(|code| ABSENT.contains(&code)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Bits of a host's prefix.
fn host_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}
