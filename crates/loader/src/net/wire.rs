//! Questions to the kernel over netlink, asked and answered on the calling thread, in its namespace.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
        NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    },
    sys::{Socket, SocketAddr},
};

/// How much of a request is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Scope {
    /// One object; the kernel says when it is done.
    One,
    /// One that shall be made.
    New,
    /// All of a kind.
    All,
    /// Those of a kind that have what the request says, picked out by the kernel (Linux 4.20).
    Picked,
}

/// How often all that match are asked for again because they changed meanwhile.
const TRIES: usize = 50;

/// Sends a request and answers what the kernel answers: of many what there was at one time.
///
/// The kernel lists part by part. What changes in between makes it leave things out or name them twice, and it says so
/// (`NLM_F_DUMP_INTR`, Documentation/userspace-api/netlink/intro.rst).
///
/// # Errors
/// The kernel's; `ResourceBusy` if there was no time without a change.
pub(super) fn ask<M>(protocol: isize, request: M, scope: Scope) -> io::Result<Vec<M>>
where
    M: NetlinkSerializable + NetlinkDeserializable,
{
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    if scope == Scope::Picked {
        socket.set_netlink_get_strict_chk(true)?;
    }
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST
        | match scope {
            Scope::One => NLM_F_ACK,
            Scope::New => NLM_F_ACK | NLM_F_CREATE,
            Scope::All | Scope::Picked => NLM_F_DUMP,
        };
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    for _ in 0..TRIES {
        socket.send(&bytes, 0)?;
        let mut answer = Answer::default();
        while !answer.is_whole {
            let (datagram, _) = socket.recv_from_full()?;
            answer.read(&datagram)?;
        }
        if !answer.is_interrupted {
            return Ok(answer.messages);
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("it changed each of {TRIES} times while it was listed")))
}

/// What has come so far.
struct Answer<M> {
    messages: Vec<M>,
    /// The last message was among them.
    is_whole: bool,
    /// What was asked for changed meanwhile.
    is_interrupted: bool,
}

impl<M> Default for Answer<M> {
    fn default() -> Self {
        Answer { messages: Vec::new(), is_whole: false, is_interrupted: false }
    }
}

impl<M: NetlinkDeserializable> Answer<M> {
    /// Adds the messages of a datagram.
    fn read(&mut self, datagram: &[u8]) -> io::Result<()> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4);
            self.is_interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::InnerMessage(answer) => self.messages.push(answer),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(done) if done.code < 0 => return Err(io::Error::from_raw_os_error(-done.code)),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                    self.is_whole = true;
                    return Ok(());
                }
                NetlinkPayload::Overrun(_) => {
                    return Err(io::Error::other("the kernel could not send all of the answer"));
                }
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}
