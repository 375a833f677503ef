//! Layouts that are checked when they are compiled, and the hash that names them.

/// A type that may be copied byte for byte across the kernel boundary.
///
/// Only the `plain!` macro of this crate can implement it: it proves at compile time that the type
/// has no padding and the size that was written down. Every bit pattern is a valid value.
pub trait Plain: Copy + Default + 'static + sealed::Sealed {
    /// Name, fields and size, as hashed into [`ABI_HASH`].
    const LAYOUT: &'static str;
}

pub(crate) mod sealed {
    /// Keeps [`super::Plain`] to the types of this crate.
    pub trait Sealed {}
}

impl sealed::Sealed for u32 {}
impl Plain for u32 {
    const LAYOUT: &'static str = "u32";
}
impl sealed::Sealed for u64 {}
impl Plain for u64 {
    const LAYOUT: &'static str = "u64";
}

/// Declares `repr(C)` structs of a stated size, without padding.
macro_rules! plain {
    ($($(#[$meta:meta])* pub struct $name:ident = $size:literal { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
            pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }

            impl $crate::layout::sealed::Sealed for $name {}
            impl $crate::layout::Plain for $name {
                const LAYOUT: &'static str = concat!(
                    stringify!($name), " ", stringify!($size), " {", $(stringify!($field), ": ", stringify!($ty), ", ",)* "}"
                );
            }
            const _: () = assert!(core::mem::size_of::<$name>() == $size, concat!("size of ", stringify!($name)));
            const _: () = assert!(
                0 $(+ core::mem::size_of::<$ty>())* == core::mem::size_of::<$name>(),
                concat!(stringify!($name), " has implicit padding")
            );
        )*
    };
}
pub(crate) use plain;

/// Hash (FNV-1a, 64 bits) of every layout and every map definition.
///
/// Two builds with the same hash can share pinned maps; two with different hashes must not.
pub const ABI_HASH: u64 = {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let text = abi_text();
    let mut i = 0;
    while i < text.len() {
        hash = fnv(hash, text[i].as_bytes());
        i += 1;
    }
    let mut i = 0;
    while i < crate::map::ALL.len() {
        let map = &crate::map::ALL[i];
        hash = fnv(hash, map.name.as_bytes());
        hash = fnv(hash, &[map.kind as u8]);
        hash = fnv(hash, &map.key_size.to_le_bytes());
        hash = fnv(hash, &map.value_size.to_le_bytes());
        hash = fnv(hash, &map.flags.to_le_bytes());
        i += 1;
    }
    hash
};

/// The layout of every type that stands in a map or an event, one string each.
pub const fn abi_text() -> &'static [&'static str] {
    &[
        crate::Tuple::LAYOUT,
        crate::FlowKey4::LAYOUT,
        crate::Recipe::LAYOUT,
        crate::FragmentKey::LAYOUT,
        crate::FragmentPorts::LAYOUT,
        crate::Endpoint::LAYOUT,
        crate::IpcacheKey::LAYOUT,
        crate::Ipcache::LAYOUT,
        crate::NodeConfig::LAYOUT,
        crate::PolicyKey::LAYOUT,
        crate::PolicyEntry::LAYOUT,
        crate::FlowEvent::LAYOUT,
        crate::ServiceKey::LAYOUT,
        crate::Service::LAYOUT,
        crate::Backend::LAYOUT,
        crate::ServiceSlot::LAYOUT,
        crate::AffinityKey::LAYOUT,
        crate::Affinity::LAYOUT,
        crate::RangeKey::LAYOUT,
        crate::SnatPool::LAYOUT,
        crate::BackendCounter::LAYOUT,
        crate::SocketService::LAYOUT,
        crate::SocketServices::LAYOUT,
        crate::Counter::LAYOUT,
    ]
}

const fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}
