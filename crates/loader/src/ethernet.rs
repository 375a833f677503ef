//! What a device is, by two ioctls that answer in the caller's network namespace.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use crate::net::probe;

/// A device's Ethernet address.
pub(crate) fn address(device: &str) -> io::Result<[u8; 6]> {
    let socket = probe()?;
    let mut request = Request::new(device)?;
    // SAFETY: the request is as `struct ifreq` is; the kernel writes an address into its union.
    unsafe { call(socket.as_fd(), libc::SIOCGIFHWADDR, &mut request)? };
    let mut mac = [0; 6];
    // The family comes first, two bytes.
    mac.copy_from_slice(&request.union[2..8]);
    Ok(mac)
}

/// Whether a device is one end of a virtual Ethernet pair.
pub(crate) fn is_veth(device: &str) -> io::Result<bool> {
    const GET_DRIVER: u32 = 3;
    let socket = probe()?;
    let mut request = Request::new(device)?;
    let mut info = DriverInfo { command: GET_DRIVER, driver: [0; 32], rest: [0; 160] };
    request.union[..size_of::<usize>()].copy_from_slice(&(&raw mut info as usize).to_ne_bytes());
    // SAFETY: the union holds a pointer to a `struct ethtool_drvinfo`, which lives until after the call.
    unsafe { call(socket.as_fd(), libc::SIOCETHTOOL, &mut request)? };
    Ok(info.driver.starts_with(b"veth\0"))
}

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    union: [u8; 24],
}

impl Request {
    fn new(device: &str) -> io::Result<Request> {
        let mut request = Request { name: [0; libc::IFNAMSIZ], union: [0; 24] };
        let bytes = device.as_bytes();
        if bytes.len() >= request.name.len() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        request.name[..bytes.len()].copy_from_slice(bytes);
        Ok(request)
    }
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// # Safety
///
/// What `number` reads and writes in `request` must be valid for it.
unsafe fn call(socket: BorrowedFd<'_>, number: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: a socket, and a request that the caller vouches for.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number as _, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
