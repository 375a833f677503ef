//! Compiled policy: one immutable table per rule set.
//!
//! # Lookup contract
//!
//! A rule set is a longest-prefix trie from [`PolicyKey`] to [`PolicyEntry`]. For one direction the
//! packet path looks up at most three peers, with protocol and destination port complete:
//!
//! 1. the peer's identity,
//! 2. the peer's CIDR block ([`crate::Ipcache::block`]), if it has one,
//! 3. the wildcard peer, identity 0.
//!
//! Of the entries found the one with the highest `precedence` wins; among equals the longer
//! `prefix_len`, then the earlier in the list above. Inside one peer the trie answers only with the
//! longest prefix, so the compiler must put the winning rule of all that cover a prefix there.
//!
//! A complete rule set always holds a wildcard entry with prefix [`PolicyKey::STATIC_BITS`] for
//! each direction: [`Cookie::DEFAULT_ALLOW`] where no policy selects the endpoint, else
//! [`Cookie::DEFAULT_DENY`], both with precedence 0. A packet for which nothing is found at all is
//! dropped as [`crate::DropReason::NO_POLICY`]: an incomplete table never opens anything.

use crate::{Identity, layout::plain};

plain! {
    /// Key of a rule set's trie. The trie compares the bytes after `prefix_len` in order.
    pub struct PolicyKey = 12 {
        /// Significant bits of what follows: [`PolicyKey::STATIC_BITS`] for any protocol,
        /// 8 more for one protocol, 1 to 16 more for a range of ports or one.
        pub prefix_len: u32,
        /// Peer: an identity, a CIDR block's number, or 0 for any. Host order, compared whole.
        pub peer: u32,
        /// [`crate::Direction`].
        pub direction: u8,
        /// IP protocol, 0 with the prefix that leaves it out.
        pub proto: u8,
        /// Destination port in network order; for ICMP the type; 0 if the prefix leaves it out.
        pub port: [u8; 2],
    }
    /// What a rule set answers.
    pub struct PolicyEntry = 12 {
        /// Higher wins; see [`precedence`].
        pub precedence: u32,
        /// Names the rule.
        pub cookie: u32,
        /// Port of the proxy to send to, network order; 0 for none.
        pub proxy_port: u16,
        /// [`policy_flag`].
        pub flags: u8,
        /// `prefix_len` of the key that this entry stands under.
        pub prefix_len: u8,
    }
}

/// Bits of [`PolicyEntry::flags`].
pub mod policy_flag {
    /// The packet may pass.
    pub const ALLOW: u8 = 1;
    /// Denied, but let through and reported (audit).
    pub const AUDIT: u8 = 2;
}

impl PolicyKey {
    /// Bits that are always compared: peer and direction.
    pub const STATIC_BITS: u32 = 40;
    /// Bits of a key with a protocol and no port.
    pub const PROTO_BITS: u32 = 48;
    /// Bits of a complete key.
    pub const FULL_BITS: u32 = 64;
}

/// Which entry of the outer table holds a rule set; also its epoch slot. 0 means none.
pub type RulesetSlot = u16;

/// Verdict as it stands in an event. The numbers are Hubble's (`flow.proto`, Verdict).
pub struct Verdict;

impl Verdict {
    /// Passed on.
    pub const FORWARDED: u8 = 1;
    /// Dropped; the reason says why.
    pub const DROPPED: u8 = 2;
    /// Would have been dropped, but the rule only audits.
    pub const AUDIT: u8 = 4;
    /// Sent to a proxy.
    pub const REDIRECTED: u8 = 5;
}

/// Well-known values of [`PolicyEntry::cookie`]; the others name rules of policies.
pub struct Cookie;

impl Cookie {
    /// No rule was asked.
    pub const NONE: u32 = 0;
    /// No policy selects the endpoint in this direction.
    pub const DEFAULT_ALLOW: u32 = 1;
    /// A policy selects the endpoint in this direction and none of its rules allows this.
    pub const DEFAULT_DENY: u32 = 2;
    /// Traffic between a workload and its own node is always allowed (NetworkPolicy API).
    pub const OWN_NODE: u32 = 3;
    /// First number that names a rule.
    pub const FIRST_RULE: u32 = 16;
}

/// The precedence word, as Cilium lays it out (its contract C7).
///
/// `priority`: 0 is the strongest, at most `0xff_ffff`. `verdict`: 255 deny, 1 allow, 0 pass,
/// 2 to 254 redirect. So a deny beats an allow of the same priority at any specificity.
pub const fn precedence(priority: u32, verdict: u8) -> u32 {
    ((0xff_ffff - (priority & 0xff_ffff)) << 8) | verdict as u32
}

impl PolicyKey {
    /// The complete key that the packet path asks with.
    #[inline(always)]
    pub const fn full(peer: Identity, direction: u8, proto: u8, port: [u8; 2]) -> PolicyKey {
        PolicyKey { prefix_len: Self::FULL_BITS, peer: peer.id, direction, proto, port }
    }
}
