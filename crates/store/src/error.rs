use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;

/// Why a store did not do what it was asked, and what to do about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No etcd endpoint answered in time. Watches and leases keep trying by themselves.
    #[error(
        "etcd did not answer within {waited:.1?} (tried {}; last: {last}). Watches and leases keep \
         trying. Check that etcd runs, has a leader, and that store.etcd.endpoints is right",
        .endpoints.join(", ")
    )]
    Unreachable {
        /// All endpoints, in the order they were tried.
        endpoints: Vec<String>,
        /// How long the call tried.
        waited: Duration,
        /// What the last attempt said.
        last: String,
    },

    /// etcd is out of space and refuses writes.
    #[error(
        "etcd refuses writes: {message}. Compact and defragment it (etcdctl compact, etcdctl \
         defrag), raise --quota-backend-bytes if need be, then run etcdctl alarm disarm"
    )]
    EtcdFull {
        /// etcd's own words.
        message: String,
    },

    /// etcd does not let this client in.
    #[error("etcd refused access: {message}. Check the user, role and certificates given to Cirri")]
    Denied {
        /// etcd's own words.
        message: String,
    },

    /// etcd understood the request and rejected it: a defect here, or a limit there.
    #[error(
        "etcd rejected {what}: {message}. If the value is too large, raise etcd's \
         --max-request-bytes; otherwise please report this"
    )]
    Rejected {
        /// The call.
        what: &'static str,
        /// etcd's own words.
        message: String,
    },

    /// An endpoint in the configuration is not a URL that can be used.
    #[error(
        "store.etcd.endpoints: `{endpoint}` is no usable endpoint ({reason}). Write \
         http://<host>:<port>, e.g. http://127.0.0.1:2379"
    )]
    BadEndpoint {
        /// As configured.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The configuration names no endpoint.
    #[error("store.etcd.endpoints is empty. Name at least one, e.g. http://127.0.0.1:2379")]
    NoEndpoints,

    /// The disk under the embedded store is full. What was written before stays readable.
    #[error(
        "the disk that holds {} is full: the write was not made, earlier state is intact. Free \
         space there; writes succeed again as soon as there is room",
        .path.display()
    )]
    DiskFull {
        /// The store's file.
        path: PathBuf,
    },

    /// The embedded store's file could not be read or written.
    #[error("cannot {doing} {}: {source}. Check that the directory exists, is writable and healthy", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The store's file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// Another process has the embedded store open.
    #[error(
        "{} is in use by another process. Stop the other agent, or give this one a stateDir of \
         its own",
        .path.display()
    )]
    InUse {
        /// The store's file.
        path: PathBuf,
    },

    /// The embedded store's file is damaged and could not be set aside.
    #[error(
        "{} is damaged ({reason}) and could not be set aside: {source}. Move it away by hand: the \
         state is rebuilt from the manifests and the running workloads",
        .path.display()
    )]
    Corrupt {
        /// The store's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// Why it could not be renamed.
        source: io::Error,
    },

    /// The embedded store's file was written by another version of Cirri.
    #[error(
        "{} has schema {found}, this version knows {known}. Run the version that wrote it, or move \
         the file away: the state is rebuilt from the manifests and the running workloads",
        .path.display()
    )]
    Schema {
        /// The store's file.
        path: PathBuf,
        /// What the file says.
        found: u64,
        /// What this version writes.
        known: u64,
    },

    /// The folder of manifests cannot be watched.
    #[error("cannot watch {}: {source}. {hint}", .path.display())]
    Folder {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
}
