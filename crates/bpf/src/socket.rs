//! Services in the system calls: a node's cgroup.

use aya_ebpf::{
    EbpfContext,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use cirri_abi::{Addr, Port, SocketServices};
use cirri_datapath::{Attempt, Socket, SocketVerdict, bind, reach, restore};

use crate::{
    maps::{PER_PACKET, SOCKETS},
    services::Maps,
    tables::lookup,
};

const GO_ON: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// `connect` to an IPv4 address.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    attempt(Attempt::Connect, ctx, false)
}

/// `connect` to an IPv6 address, or an IPv4 address in mapped form.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    attempt(Attempt::Connect, ctx, true)
}

/// `sendto` and `sendmsg` of a datagram to an IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    attempt(Attempt::Send, ctx, false)
}

/// `sendto` and `sendmsg` of a datagram to an IPv6 address, or an IPv4 address in mapped form.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    attempt(Attempt::Send, ctx, true)
}

/// `recvfrom` and `recvmsg`, which tell the IPv4 sender of a datagram.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    tell(ctx, false)
}

/// The same for IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    tell(ctx, true)
}

/// `getpeername`.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    tell(ctx, false)
}

/// The same for IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    tell(ctx, true)
}

/// `bind` to an IPv4 address.
#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    if bind(&mut Call { ctx, v6: false }, &Maps) { GO_ON } else { REFUSE }
}

/// `bind` to an IPv6 address.
#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    if bind(&mut Call { ctx, v6: true }, &Maps) { GO_ON } else { REFUSE }
}

#[inline(always)]
fn attempt(attempt: Attempt, ctx: SockAddrContext, v6: bool) -> i32 {
    match reach(attempt, &mut Call { ctx, v6 }, &Maps) {
        SocketVerdict::Proceed => GO_ON,
        SocketVerdict::Refused => {
            // SAFETY: helper without pointers.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            REFUSE
        }
    }
}

/// These calls may not be refused.
#[inline(always)]
fn tell(ctx: SockAddrContext, v6: bool) -> i32 {
    restore(&mut Call { ctx, v6 });
    GO_ON
}

/// A system call on a socket.
struct Call {
    ctx: SockAddrContext,
    v6: bool,
}

impl Call {
    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }
}

impl Socket for Call {
    #[inline(always)]
    fn address(&self) -> Addr {
        // SAFETY: fields of the context, each read as a word: the verifier allows no copy of them.
        unsafe {
            if self.v6 {
                let words = &raw const (*self.raw()).user_ip6;
                let word = |i: usize| words.cast::<u32>().add(i).read_volatile();
                Addr { words: [word(0), word(1), word(2), word(3)] }
            } else {
                Addr::v4_word((&raw const (*self.raw()).user_ip4).read_volatile())
            }
        }
    }

    #[inline(always)]
    fn port(&self) -> Port {
        // SAFETY: as above. The port stands in network order in the first two bytes.
        Port { be: unsafe { (&raw const (*self.raw()).user_port).read_volatile() } as u16 }
    }

    #[inline(always)]
    fn set(&mut self, addr: &Addr, port: Port) {
        // SAFETY: writable fields of the context.
        unsafe {
            if self.v6 {
                let words = &raw mut (*self.raw()).user_ip6;
                for i in 0..4 {
                    words.cast::<u32>().add(i).write_volatile(addr.words[i]);
                }
            } else {
                (&raw mut (*self.raw()).user_ip4).write_volatile(addr.word());
            }
            (&raw mut (*self.raw()).user_port).write_volatile(port.be as u32);
        }
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*self.raw()).protocol).read_volatile() as u8 }
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the program's own.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn is_per_packet(&self, cookie: u64) -> bool {
        lookup::<_, _, u32>(&raw const PER_PACKET, &cookie).is_some()
    }

    #[inline(always)]
    fn services(&mut self) -> Option<&mut SocketServices> {
        // SAFETY: the socket's own storage, or null. Two calls on one socket may write it at once: a
        // service is then forgotten, which costs its answers' senders their names.
        unsafe { SOCKETS.get_ptr_mut(&self.ctx).as_mut() }
    }

    #[inline(always)]
    fn services_or_new(&mut self) -> Option<&mut SocketServices> {
        // SAFETY: as above.
        unsafe { SOCKETS.get_or_insert_ptr_mut(&self.ctx, None).as_mut() }
    }
}
