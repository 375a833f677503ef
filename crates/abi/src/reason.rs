//! Why a packet was dropped.

use crate::layout::plain;

plain! {
    /// A reason, with the number and the text that people know from Cilium (`pkg/monitor/api/drop.go`).
    pub struct DropReason = 1 {
        /// The number, 130 to 255.
        pub code: u8,
    }
}

impl DropReason {
    /// Invalid source mac.
    pub const INVALID_SOURCE_MAC: DropReason = DropReason { code: 130 };
    /// Invalid destination mac.
    pub const INVALID_DESTINATION_MAC: DropReason = DropReason { code: 131 };
    /// Invalid source ip.
    pub const INVALID_SOURCE_IP: DropReason = DropReason { code: 132 };
    /// Policy denied.
    pub const POLICY_DENIED: DropReason = DropReason { code: 133 };
    /// Invalid packet.
    pub const INVALID_PACKET: DropReason = DropReason { code: 134 };
    /// CT: Truncated or invalid header.
    pub const CT_INVALID_HEADER: DropReason = DropReason { code: 135 };
    /// Fragmentation needed.
    pub const FRAGMENTATION_NEEDED: DropReason = DropReason { code: 136 };
    /// CT: Unknown L4 protocol.
    pub const CT_UNKNOWN_L4: DropReason = DropReason { code: 137 };
    /// Unsupported L3 protocol.
    pub const UNSUPPORTED_L3: DropReason = DropReason { code: 139 };
    /// Missed tail call.
    pub const MISSED_TAIL_CALL: DropReason = DropReason { code: 140 };
    /// Error writing to packet.
    pub const WRITE_ERROR: DropReason = DropReason { code: 141 };
    /// Unknown L4 protocol.
    pub const UNKNOWN_L4: DropReason = DropReason { code: 142 };
    /// Error retrieving tunnel key.
    pub const NO_TUNNEL_KEY: DropReason = DropReason { code: 147 };
    /// Unknown L3 target address.
    pub const UNKNOWN_L3_TARGET: DropReason = DropReason { code: 150 };
    /// Stale or unroutable IP.
    pub const UNROUTABLE: DropReason = DropReason { code: 151 };
    /// No matching local container found.
    pub const NO_LOCAL_ENDPOINT: DropReason = DropReason { code: 152 };
    /// Error while correcting L3 checksum.
    pub const L3_CHECKSUM: DropReason = DropReason { code: 153 };
    /// Error while correcting L4 checksum.
    pub const L4_CHECKSUM: DropReason = DropReason { code: 154 };
    /// CT: Map insertion failed.
    pub const FLOW_INSERT_FAILED: DropReason = DropReason { code: 155 };
    /// Invalid IPv6 extension header.
    pub const INVALID_EXTENSION_HEADER: DropReason = DropReason { code: 156 };
    /// IP fragmentation not supported.
    pub const FRAGMENT_UNSUPPORTED: DropReason = DropReason { code: 157 };
    /// Service backend not found.
    pub const NO_BACKEND: DropReason = DropReason { code: 158 };
    /// No tunnel/encapsulation endpoint (datapath BUG!).
    pub const NO_TUNNEL_PEER: DropReason = DropReason { code: 160 };
    /// Unknown connection tracking state.
    pub const UNKNOWN_STATE: DropReason = DropReason { code: 163 };
    /// No configuration available to perform policy decision.
    pub const NO_CONFIG: DropReason = DropReason { code: 165 };
    /// Unsupported L2 protocol.
    pub const UNSUPPORTED_L2: DropReason = DropReason { code: 166 };
    /// No mapping for NAT masquerade.
    pub const NO_MASQUERADE_PORT: DropReason = DropReason { code: 167 };
    /// Unsupported protocol for NAT masquerade.
    pub const MASQUERADE_UNSUPPORTED: DropReason = DropReason { code: 168 };
    /// FIB lookup failed.
    pub const FIB_FAILED: DropReason = DropReason { code: 169 };
    /// Encapsulation traffic is prohibited.
    pub const ENCAPSULATION_PROHIBITED: DropReason = DropReason { code: 170 };
    /// Invalid identity.
    pub const INVALID_IDENTITY: DropReason = DropReason { code: 171 };
    /// Unknown sender.
    pub const UNKNOWN_SENDER: DropReason = DropReason { code: 172 };
    /// Is a ClusterIP.
    pub const CLUSTER_IP: DropReason = DropReason { code: 174 };
    /// First logical datagram fragment not found.
    pub const FIRST_FRAGMENT_MISSING: DropReason = DropReason { code: 175 };
    /// Forbidden ICMPv6 message.
    pub const FORBIDDEN_ICMPV6: DropReason = DropReason { code: 176 };
    /// Denied by LB src range check.
    pub const SOURCE_RANGE: DropReason = DropReason { code: 177 };
    /// Policy denied by denylist.
    pub const POLICY_DENIED_BY_RULE: DropReason = DropReason { code: 181 };
    /// Unsupported packet for DSR.
    pub const UNSUPPORTED_DSR: DropReason = DropReason { code: 193 };
    /// TTL exceeded.
    pub const TTL_EXCEEDED: DropReason = DropReason { code: 196 };
    /// Host datapath not ready.
    pub const NOT_READY: DropReason = DropReason { code: 202 };
    /// Endpoint policy program not available.
    pub const NO_POLICY: DropReason = DropReason { code: 203 };

    /// Every reason that the packet path gives, by number.
    pub const ALL: &[DropReason] = &[
        Self::INVALID_SOURCE_MAC,
        Self::INVALID_DESTINATION_MAC,
        Self::INVALID_SOURCE_IP,
        Self::POLICY_DENIED,
        Self::INVALID_PACKET,
        Self::CT_INVALID_HEADER,
        Self::FRAGMENTATION_NEEDED,
        Self::CT_UNKNOWN_L4,
        Self::UNSUPPORTED_L3,
        Self::MISSED_TAIL_CALL,
        Self::WRITE_ERROR,
        Self::UNKNOWN_L4,
        Self::NO_TUNNEL_KEY,
        Self::UNKNOWN_L3_TARGET,
        Self::UNROUTABLE,
        Self::NO_LOCAL_ENDPOINT,
        Self::L3_CHECKSUM,
        Self::L4_CHECKSUM,
        Self::FLOW_INSERT_FAILED,
        Self::INVALID_EXTENSION_HEADER,
        Self::FRAGMENT_UNSUPPORTED,
        Self::NO_BACKEND,
        Self::NO_TUNNEL_PEER,
        Self::UNKNOWN_STATE,
        Self::NO_CONFIG,
        Self::UNSUPPORTED_L2,
        Self::NO_MASQUERADE_PORT,
        Self::MASQUERADE_UNSUPPORTED,
        Self::FIB_FAILED,
        Self::ENCAPSULATION_PROHIBITED,
        Self::INVALID_IDENTITY,
        Self::UNKNOWN_SENDER,
        Self::CLUSTER_IP,
        Self::FIRST_FRAGMENT_MISSING,
        Self::FORBIDDEN_ICMPV6,
        Self::SOURCE_RANGE,
        Self::POLICY_DENIED_BY_RULE,
        Self::UNSUPPORTED_DSR,
        Self::TTL_EXCEEDED,
        Self::NOT_READY,
        Self::NO_POLICY,
    ];

    /// The text that people know.
    pub const fn text(self) -> &'static str {
        match self.code {
            130 => "Invalid source mac",
            131 => "Invalid destination mac",
            132 => "Invalid source ip",
            133 => "Policy denied",
            134 => "Invalid packet",
            135 => "CT: Truncated or invalid header",
            136 => "Fragmentation needed",
            137 => "CT: Unknown L4 protocol",
            139 => "Unsupported L3 protocol",
            140 => "Missed tail call",
            141 => "Error writing to packet",
            142 => "Unknown L4 protocol",
            147 => "Error retrieving tunnel key",
            150 => "Unknown L3 target address",
            151 => "Stale or unroutable IP",
            152 => "No matching local container found",
            153 => "Error while correcting L3 checksum",
            154 => "Error while correcting L4 checksum",
            155 => "CT: Map insertion failed",
            156 => "Invalid IPv6 extension header",
            157 => "IP fragmentation not supported",
            158 => "Service backend not found",
            160 => "No tunnel/encapsulation endpoint (datapath BUG!)",
            163 => "Unknown connection tracking state",
            165 => "No configuration available to perform policy decision",
            166 => "Unsupported L2 protocol",
            167 => "No mapping for NAT masquerade",
            168 => "Unsupported protocol for NAT masquerade",
            169 => "FIB lookup failed",
            170 => "Encapsulation traffic is prohibited",
            171 => "Invalid identity",
            172 => "Unknown sender",
            174 => "Is a ClusterIP",
            175 => "First logical datagram fragment not found",
            176 => "Forbidden ICMPv6 message",
            177 => "Denied by LB src range check",
            181 => "Policy denied by denylist",
            196 => "TTL exceeded",
            202 => "Host datapath not ready",
            203 => "Endpoint policy program not available",
            _ => "Unknown reason",
        }
    }

    /// The short name, as in `cirri observe --reason`.
    pub const fn name(self) -> &'static str {
        match self.code {
            130 => "INVALID_SOURCE_MAC",
            131 => "INVALID_DESTINATION_MAC",
            132 => "INVALID_SOURCE_IP",
            133 => "POLICY_DENIED",
            134 => "INVALID_PACKET",
            135 => "CT_INVALID_HEADER",
            136 => "FRAGMENTATION_NEEDED",
            137 => "CT_UNKNOWN_L4",
            139 => "UNSUPPORTED_L3",
            140 => "MISSED_TAIL_CALL",
            141 => "WRITE_ERROR",
            142 => "UNKNOWN_L4",
            147 => "NO_TUNNEL_KEY",
            150 => "UNKNOWN_L3_TARGET",
            151 => "UNROUTABLE",
            152 => "NO_LOCAL_ENDPOINT",
            153 => "L3_CHECKSUM",
            154 => "L4_CHECKSUM",
            155 => "FLOW_INSERT_FAILED",
            156 => "INVALID_EXTENSION_HEADER",
            157 => "FRAGMENT_UNSUPPORTED",
            158 => "NO_BACKEND",
            160 => "NO_TUNNEL_PEER",
            163 => "UNKNOWN_STATE",
            165 => "NO_CONFIG",
            166 => "UNSUPPORTED_L2",
            167 => "NO_MASQUERADE_PORT",
            168 => "MASQUERADE_UNSUPPORTED",
            169 => "FIB_FAILED",
            170 => "ENCAPSULATION_PROHIBITED",
            171 => "INVALID_IDENTITY",
            172 => "UNKNOWN_SENDER",
            174 => "CLUSTER_IP",
            175 => "FIRST_FRAGMENT_MISSING",
            176 => "FORBIDDEN_ICMPV6",
            177 => "SOURCE_RANGE",
            181 => "POLICY_DENIED_BY_RULE",
            193 => "UNSUPPORTED_DSR",
            196 => "TTL_EXCEEDED",
            202 => "NOT_READY",
            203 => "NO_POLICY",
            _ => "UNKNOWN",
        }
    }
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.text())
    }
}
