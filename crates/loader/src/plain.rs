//! The types of `cirri-abi` as the bytes that the kernel sees.

use cirri_abi::Plain;

/// The bytes of a value, as the kernel reads them.
pub(crate) fn bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` is sealed in cirri-abi, whose macro proves that the type has no padding, so
    // every byte is initialized; the slice covers exactly the value and borrows it.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The bytes of many values in a row, as batch operations read them.
pub(crate) fn bytes_of_all<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: as in `bytes`; elements of a slice lie without gaps.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// A value from bytes that the kernel wrote; `None` if there are too few.
pub(crate) fn read<T: Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, the read is unaligned, and every bit pattern of a `Plain`
    // type is a valid value.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

#[cfg(test)]
mod tests {
    use cirri_abi::{Addr, IpcacheKey};

    use super::*;

    #[test]
    fn a_value_survives_the_way_to_bytes_and_back() {
        let key = IpcacheKey { prefix_len: 128, addr: Addr::v4([10, 1, 2, 3]) };
        assert_eq!(bytes(&key).len(), 20);
        assert_eq!(&bytes(&key)[16..], [10, 1, 2, 3]);
        assert_eq!(read::<IpcacheKey>(bytes(&key)), Some(key));
        assert_eq!(bytes_of_all(&[key, key]).len(), 40);
    }

    #[test]
    fn too_few_bytes_are_no_value() {
        assert_eq!(read::<Addr>(&[0; 15]), None);
    }
}
