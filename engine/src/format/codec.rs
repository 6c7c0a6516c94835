//! The encoding of fields: little-endian, fixed width, no padding between them; sequences carry a `u32` count.
//!
//! A decoder never trusts a length: every count is bounded by the bytes that are left before anything is allocated.

use std::collections::BTreeMap;

use crate::ids::{AccountId, Epoch, Location, Lsn, MailboxId, MessageId, ModSeq, Position, SegmentId, ShardId, Uid};

/// The bytes do not say what they should. The place is added by who knows it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("ends {missing} bytes too early")]
    Short { missing: usize },
    #[error("{0} bytes left over after the last field")]
    Trailing(usize),
    #[error("field {field} has the impossible value {value}")]
    Value { field: &'static str, value: u64 },
    #[error("text that is not UTF-8")]
    Utf8,
    #[error("a bitmap that does not decode")]
    Bitmap,
}

/// Bytes still to be decoded.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        match self.0.split_at_checked(len) {
            Some((taken, rest)) => {
                self.0 = rest;
                Ok(taken)
            }
            None => Err(DecodeError::Short { missing: len - self.0.len() }),
        }
    }

    /// All fields must have been taken.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.0.len())) }
    }
}

/// A value with one encoding.
pub trait Wire: Sized {
    /// The fewest bytes that a value takes; bounds the count of a sequence.
    const MIN_BYTES: usize;

    fn put(&self, out: &mut Vec<u8>);
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError>;

    /// Appends the values of a sequence.
    fn put_each(values: &[Self], out: &mut Vec<u8>) {
        for value in values {
            value.put(out);
        }
    }

    /// Takes the `count` values of a sequence, whose least size has been checked.
    fn take_each(count: usize, input: &mut Input<'_>) -> Result<Vec<Self>, DecodeError> {
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(Self::take(input)?);
        }
        Ok(values)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.put(&mut out);
        out
    }

    /// Decodes exactly these bytes.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input(bytes);
        let value = Self::take(&mut input)?;
        input.finish()?;
        Ok(value)
    }
}

macro_rules! wire_integers {
    ($($integer:ty),*) => {$(
        impl Wire for $integer {
            const MIN_BYTES: usize = size_of::<$integer>();

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
                let mut bytes = [0; size_of::<$integer>()];
                bytes.copy_from_slice(input.bytes(size_of::<$integer>())?);
                Ok(Self::from_le_bytes(bytes))
            }
        }
    )*};
}
wire_integers!(u16, u32, u64, u128, i16, i32, i64);

impl Wire for u8 {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(input.bytes(1)?[0])
    }

    // Prefixes of many recipients are most of a record's head: bytes are copied, not taken one by one.
    fn put_each(values: &[Self], out: &mut Vec<u8>) {
        out.extend_from_slice(values);
    }

    fn take_each(count: usize, input: &mut Input<'_>) -> Result<Vec<Self>, DecodeError> {
        Ok(input.bytes(count)?.to_vec())
    }
}

macro_rules! wire_newtypes {
    ($($name:ident($inner:ty)),*) => {$(
        impl Wire for $name {
            const MIN_BYTES: usize = <$inner>::MIN_BYTES;

            fn put(&self, out: &mut Vec<u8>) {
                self.0.put(out);
            }

            fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
                <$inner>::take(input).map($name)
            }
        }
    )*};
}
wire_newtypes!(
    ShardId(u32),
    Epoch(u32),
    SegmentId(u32),
    Uid(u32),
    ModSeq(u64),
    MailboxId(u64),
    AccountId(u64),
    Lsn(u64)
);

impl Wire for bool {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        match u8::take(input)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::Value { field: "a boolean", value: value.into() }),
        }
    }
}

impl Wire for String {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_len(self.len(), out);
        out.extend_from_slice(self.as_bytes());
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let len = u32::take(input)? as usize;
        let bytes = input.bytes(len)?;
        str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Utf8)
    }
}

impl<T: Wire> Wire for Vec<T> {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_len(self.len(), out);
        T::put_each(self, out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let count = u32::take(input)? as usize;
        let least = count.saturating_mul(T::MIN_BYTES.max(1));
        if least > input.0.len() {
            return Err(DecodeError::Short { missing: least - input.0.len() });
        }
        T::take_each(count, input)
    }
}

impl<T: Wire> Wire for Option<T> {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(if bool::take(input)? { Some(T::take(input)?) } else { None })
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    const MIN_BYTES: usize = A::MIN_BYTES + B::MIN_BYTES;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok((A::take(input)?, B::take(input)?))
    }
}

impl<K: Wire + Ord, V: Wire> Wire for BTreeMap<K, V> {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        put_len(self.len(), out);
        for (key, value) in self {
            key.put(out);
            value.put(out);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(Vec::<(K, V)>::take(input)?.into_iter().collect())
    }
}

/// # Panics
/// If a sequence is longer than the format can say; the callers' limits are far below.
pub fn put_len(len: usize, out: &mut Vec<u8>) {
    u32::try_from(len).expect("a sequence of 2^32 items").put(out);
}

/// Implements [`Wire`] for a struct as its fields in order.
macro_rules! wire_struct {
    ($name:ty { $($field:ident: $type:ty),* $(,)? }) => {
        impl $crate::format::codec::Wire for $name {
            const MIN_BYTES: usize = 0 $(+ <$type as $crate::format::codec::Wire>::MIN_BYTES)*;

            fn put(&self, out: &mut Vec<u8>) {
                $($crate::format::codec::Wire::put(&self.$field, out);)*
            }

            fn take(
                input: &mut $crate::format::codec::Input<'_>,
            ) -> Result<Self, $crate::format::codec::DecodeError> {
                $(let $field = <$type as $crate::format::codec::Wire>::take(input)?;)*
                Ok(Self { $($field),* })
            }
        }
    };
}
pub(crate) use wire_struct;

wire_struct!(MessageId { origin: ShardId, lsn: Lsn });
wire_struct!(Position { segment: SegmentId, offset: u64 });
wire_struct!(Location { segment: SegmentId, offset_units: u32, len: u32, ordinal: u32 });
