//! Why a service port was not taken into the tables.

use crate::service::PortId;
use std::net::IpAddr;

/// Why a service port was not taken. What the tables held for it before is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Somebody else has the address and port.
    #[error("{wanted} wants {addr} port {port}, which {owner} has and keeps; give one of them another address or port")]
    Taken {
        /// Who was refused.
        wanted: Box<PortId>,
        /// Who has it.
        owner: Box<PortId>,
        /// The address.
        addr: IpAddr,
        /// The port.
        port: u16,
    },
    /// A table is full.
    #[error(
        "{id} needs {needed} more {what}, but {free} of {capacity} are free; nothing of it was changed, remove services or raise the capacity"
    )]
    Full {
        /// Who was refused.
        id: Box<PortId>,
        /// Of what, in the plural.
        what: &'static str,
        /// How many more are needed while old and new stand side by side.
        needed: u32,
        /// How many are free (slots: in all; a range needs them in one piece).
        free: u32,
        /// How many there are.
        capacity: u32,
    },
    /// A backend that this family cannot reach.
    #[error(
        "{id} has the backend {backend}, which is of the other family; give backends of each family to the service port of that family"
    )]
    Family {
        /// Who was refused.
        id: Box<PortId>,
        /// The backend's address.
        backend: IpAddr,
    },
    /// A frontend of the other family.
    #[error("{id} is to be reached at {addr}, which is of the other family; give it an address of its own family")]
    FrontendFamily {
        /// Who was refused.
        id: Box<PortId>,
        /// The address.
        addr: IpAddr,
    },
    /// Port 0.
    #[error("{id} names port 0; use 1 to 65535")]
    NoPort {
        /// Who was refused.
        id: Box<PortId>,
    },
    /// No such size.
    #[error(
        "{id} wants a Maglev table of {size} slots; use one of 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071"
    )]
    MaglevSize {
        /// Who was refused.
        id: Box<PortId>,
        /// What it wants.
        size: u32,
    },
}
