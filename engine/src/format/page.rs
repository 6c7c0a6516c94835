//! Index pages: rkyv archives of a mailbox's state, of its changes since (delta pages), of accounts, and the directory
//! of an index blob. A page has a header with its own checksum over header and contents.

use rkyv::rancor;
use rkyv::util::AlignedVec;
use zstd::zstd_safe::get_frame_content_size;

use super::codec::{Input, Wire, wire_struct};
use super::frame::{Packer, Unpacker, codec_id};
use super::segment::FooterEntry;
use super::{FORMAT_VERSION, FormatError, checksum, verify_checksum};
use crate::ids::{Epoch, Lsn, SegmentId};

const MAGIC: u32 = u32::from_le_bytes(*b"PHPG");
/// Magic, checksum, version and kind, codec, lengths, as-of LSN, owner.
pub const PAGE_HEADER_BYTES: usize = 48;

/// The largest archive that a page holds. A mailbox of [`crate::index::MESSAGES_MAX`] messages fits.
pub const PAGE_RAW_BYTES_MAX: usize = 1 << 30;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum PageKind {
    /// As older stores have it.
    MailboxRows = 1,
    MailboxDelta = 2,
    Accounts = 3,
    Directory = 4,
    Mailbox = 5,
    Records = 6,
}

impl PageKind {
    fn from_number(number: u16) -> Option<Self> {
        let old = [Self::MailboxRows, Self::MailboxDelta, Self::Accounts, Self::Directory];
        let all = old.into_iter().chain([Self::Mailbox, Self::Records]);
        all.into_iter().find(|&kind| kind as u16 == number)
    }

    /// Whether this may be where `expected` is looked for.
    fn stands_for(self, expected: Self) -> bool {
        self == expected || (self, expected) == (Self::MailboxRows, Self::Mailbox)
    }
}

/// A message as an index page of [`PageKind::MailboxRows`] has it.
#[derive(Clone, Copy, Debug, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct PageMessage {
    pub uid: u32,
    pub prefix_of: u16,
    pub zone_minutes: i16,
    pub modseq: u64,
    pub origin: u32,
    pub message: u64,
    pub segment: u32,
    pub offset_units: u32,
    pub len: u32,
    pub ordinal: u32,
    pub head_bytes: u32,
    pub size: u64,
    pub internal_date: i64,
    pub save_date: i64,
}

/// Expunge history: what went at which mod-sequence, UIDs as runs (first, last).
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct PageExpunges {
    pub modseq: u64,
    pub runs: Vec<(u32, u32)>,
}

/// The whole index of a mailbox as of a page's LSN, as [`PageKind::MailboxRows`] has it.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct MailboxRowsPage {
    /// Ascending by UID.
    pub messages: Vec<PageMessage>,
    /// Portable roaring bitmaps of UIDs, by flag bit.
    pub flags: Vec<(u8, Vec<u8>)>,
    pub expunged: Vec<PageExpunges>,
    pub history_horizon: u64,
    pub keywords: Vec<String>,
}

/// The whole index of a mailbox as of a page's LSN, but for its messages.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct MailboxPage {
    /// Portable roaring bitmaps of UIDs, by flag bit.
    pub flags: Vec<(u8, Vec<u8>)>,
    /// Expunge history: mod-sequences, and sets of UIDs as records have them.
    pub expunged: Vec<(u64, Vec<u8>)>,
    pub history_horizon: u64,
    pub keywords: Vec<String>,
}

/// The changes of a mailbox since its page: record kind, LSN, location of the record, payload as in the log.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DeltaPage {
    pub changes: Vec<DeltaChange>,
}

#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DeltaChange {
    pub lsn: u64,
    pub payload: Vec<u8>,
}

/// Where a page lies; `len` is 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct PageLocation {
    pub blob: u32,
    /// The epoch that wrote the blob.
    pub epoch: u32,
    pub offset: u64,
    pub len: u32,
}

impl From<&ArchivedPageLocation> for PageLocation {
    fn from(page: &ArchivedPageLocation) -> Self {
        Self {
            blob: page.blob.to_native(),
            epoch: page.epoch.to_native(),
            offset: page.offset.to_native(),
            len: page.len.to_native(),
        }
    }
}

impl PageLocation {
    pub fn is_none(self) -> bool {
        self.len == 0
    }
}

/// What stays in memory of a mailbox: answers STATUS and LIST, and gives the next UID.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DirectoryEntry {
    pub mailbox: u64,
    pub account: u64,
    /// Every change up to here is in the counters.
    pub as_of: u64,
    /// Every change up to here is in the pages; those since are in the log's tail.
    pub page_as_of: u64,
    pub deleted: bool,
    pub special_use: u16,
    pub name: String,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub exists: u32,
    pub unseen: u32,
    pub recent_below: u32,
    pub highest_modseq: u64,
    pub size: u64,
    pub page: PageLocation,
    pub delta: PageLocation,
}

/// Part of a blob's directory; its pages stand one after another.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DirectoryPage {
    pub mailboxes: Vec<DirectoryEntry>,
    pub accounts: Vec<AccountEntry>,
    pub directory: Vec<DirectoryAccount>,
}

/// What an account has in its own shard besides mailboxes.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct AccountEntry {
    pub account: u64,
    pub as_of: u64,
    pub uid_validity_next: u32,
    pub subscriptions: Vec<String>,
    pub attributes: Vec<(u64, String, Vec<u8>)>,
}

/// An account record, in shard 0 only.
#[derive(Clone, Debug, Default, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DirectoryAccount {
    pub account: u64,
    pub as_of: u64,
    pub name: String,
    pub shard: u32,
    pub password: String,
    pub deleted: bool,
    pub uid_validity_floor: u32,
}

/// Records of the segment in which replay begins, before where it does: its footer lists them once it is sealed. Stands in a
/// directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordsPage {
    pub segment: SegmentId,
    pub epoch: Epoch,
    /// The ordinal of the first; those before it stand in earlier pages.
    pub first: u32,
    /// Every record before this offset is in this page or in those before it.
    pub end: u64,
    pub entries: Vec<FooterEntry>,
}
wire_struct!(RecordsPage { segment: SegmentId, epoch: Epoch, first: u32, end: u64, entries: Vec<FooterEntry> });

/// What a page of a directory holds.
pub enum DirectoryPart {
    /// The archive of a [`DirectoryPage`].
    Entries(AlignedVec),
    Records(RecordsPage),
}

/// A page's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    pub kind: PageKind,
    /// The contents are the published state as of this LSN.
    pub as_of: Lsn,
    /// The mailbox, or 0.
    pub owner: u64,
    codec: u8,
    stored_len: u32,
    raw_len: u32,
}

/// Appends a page with the given archive; returns its length.
///
/// # Errors
/// The archive is larger than [`PAGE_RAW_BYTES_MAX`]: [`open_page`] would not read it back.
pub fn put_page(
    kind: PageKind,
    as_of: Lsn,
    owner: u64,
    archive: &[u8],
    packer: &mut Packer,
    out: &mut Vec<u8>,
) -> Result<usize, FormatError> {
    if archive.len() > PAGE_RAW_BYTES_MAX {
        let (len, limit) = (archive.len() as u64, PAGE_RAW_BYTES_MAX as u64);
        return Err(FormatError::TooLong { what: "index page", len, limit });
    }
    let start = out.len();
    out.resize(start + PAGE_HEADER_BYTES, 0);
    let info = packer.pack(archive, out);
    let mut header = Vec::with_capacity(PAGE_HEADER_BYTES);
    MAGIC.put(&mut header);
    0_u32.put(&mut header);
    (FORMAT_VERSION as u16).put(&mut header);
    (kind as u16).put(&mut header);
    u32::from(info.codec).put(&mut header);
    info.stored_len.put(&mut header);
    info.raw_len.put(&mut header);
    as_of.put(&mut header);
    owner.put(&mut header);
    out[start..start + header.len()].copy_from_slice(&header);
    let crc = checksum(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    Ok(out.len() - start)
}

/// Verifies a page of the expected kind and owner and gives its archive.
pub fn open_page(
    kind: PageKind,
    owner: u64,
    bytes: &[u8],
    unpacker: &mut Unpacker,
) -> Result<(PageHeader, AlignedVec), FormatError> {
    let (header, archive, len) = open_page_at(bytes, unpacker)?;
    if len != bytes.len() || !header.kind.stands_for(kind) || header.owner != owner {
        let detail = format!("{:?} of {} with {len} bytes", header.kind, header.owner);
        return Err(FormatError::Misplaced { what: "index page", detail });
    }
    Ok((header, archive))
}

/// Verifies the page of a directory that starts with `bytes`; gives what it holds and its length. The archive is not validated.
pub fn open_directory_page(bytes: &[u8], unpacker: &mut Unpacker) -> Result<(DirectoryPart, usize), FormatError> {
    const WHAT: &str = "index page";
    let (header, archive, len) = open_page_at(bytes, unpacker)?;
    let part = match header.kind {
        PageKind::Directory => DirectoryPart::Entries(archive),
        PageKind::Records => {
            let page = RecordsPage::decode(&archive).map_err(|source| FormatError::Decode { what: WHAT, source })?;
            DirectoryPart::Records(page)
        }
        kind => return Err(FormatError::Misplaced { what: WHAT, detail: format!("{kind:?} in the directory") }),
    };
    Ok((part, len))
}

/// The length that a page claims to have, verified or not.
pub fn claimed_page_len(bytes: &[u8]) -> Option<usize> {
    let len = bytes.get(16..20)?;
    Some(PAGE_HEADER_BYTES + u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize)
}

/// How many bytes of contents a page claims to have, verified or not.
pub fn claimed_contents_len(bytes: &[u8]) -> Option<usize> {
    let len = bytes.get(20..24)?;
    Some(u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize)
}

/// Verifies the page that starts with `bytes`; gives header, archive and the page's length.
pub fn open_page_at(bytes: &[u8], unpacker: &mut Unpacker) -> Result<(PageHeader, AlignedVec, usize), FormatError> {
    const WHAT: &str = "index page";
    let decode = |source| FormatError::Decode { what: WHAT, source };
    let available = bytes.len() as u64;
    let short = |needed: usize| FormatError::Short { what: WHAT, needed: needed as u64, available };
    let fixed = bytes.get(..PAGE_HEADER_BYTES).ok_or_else(|| short(PAGE_HEADER_BYTES))?;
    let mut input = Input(fixed);
    if u32::take(&mut input).map_err(decode)? != MAGIC {
        return Err(FormatError::Magic(WHAT));
    }
    let expected = u32::take(&mut input).map_err(decode)?;
    let version = u16::take(&mut input).map_err(decode)?;
    let number = u16::take(&mut input).map_err(decode)?;
    let codec = u32::take(&mut input).map_err(decode)?;
    let stored_len = u32::take(&mut input).map_err(decode)?;
    let raw_len = u32::take(&mut input).map_err(decode)?;
    let end = PAGE_HEADER_BYTES + stored_len as usize;
    let page = bytes.get(..end).ok_or_else(|| short(end))?;
    verify_checksum(WHAT, expected, &page[8..])?;
    if u32::from(version) != FORMAT_VERSION {
        return Err(FormatError::Version { what: WHAT, found: version.into() });
    }
    let as_of = Lsn::take(&mut input).map_err(decode)?;
    let owner = u64::take(&mut input).map_err(decode)?;
    let kind = PageKind::from_number(number)
        .ok_or_else(|| FormatError::Misplaced { what: WHAT, detail: format!("page kind {number}") })?;
    let codec = codec as u8;
    let stored = &page[PAGE_HEADER_BYTES..];
    if raw_len as usize > PAGE_RAW_BYTES_MAX {
        return Err(FormatError::Decompress { what: WHAT });
    }
    let mut archive = AlignedVec::with_capacity(raw_len as usize);
    match codec {
        codec_id::RAW if raw_len == stored_len => archive.extend_from_slice(stored),
        codec_id::ZSTD => {
            // Room is made for as much as both the header and the frame say.
            if get_frame_content_size(stored).is_ok_and(|len| len.is_some_and(|len| len != u64::from(raw_len))) {
                return Err(FormatError::Decompress { what: WHAT });
            }
            archive.resize(raw_len as usize, 0);
            unpacker.unpack_exactly(WHAT, stored, &mut archive)?;
        }
        _ => return Err(FormatError::Decompress { what: WHAT }),
    }
    Ok((PageHeader { kind, as_of, owner, codec, stored_len, raw_len }, archive, end))
}

/// An archive that does not validate, behind a good checksum: a bug or a forged page.
pub fn archive_error(error: &rancor::Error) -> FormatError {
    FormatError::Misplaced { what: "index page", detail: format!("its archive is invalid: {error}") }
}

/// Archives a page's value.
pub fn archive<T>(value: &T) -> AlignedVec
where
    T: for<'a> rkyv::Serialize<
            rkyv::api::high::HighSerializer<AlignedVec, rkyv::ser::allocator::ArenaHandle<'a>, rancor::Error>,
        >,
{
    rkyv::to_bytes::<rancor::Error>(value).expect("archiving into memory")
}

/// The contents of a mailbox's page: the archive, the blocks of its messages, and the length of the archive. Validation of an archive
/// looks at each byte of it, and there are twenty million of a million messages.
pub fn join_mailbox(page: &MailboxPage, messages: &[u8]) -> AlignedVec {
    let mut contents = archive(page);
    let len = u32::try_from(contents.len()).expect("flags and keywords are bounded");
    contents.extend_from_slice(messages);
    contents.extend_from_slice(&len.to_le_bytes());
    contents
}

/// Validates the archive of what [`join_mailbox`] made, and gives a view of it, and the blocks.
pub fn split_mailbox(contents: &AlignedVec) -> Result<(&ArchivedMailboxPage, &[u8]), FormatError> {
    let parts =
        contents.split_last_chunk().and_then(|(rest, len)| rest.split_at_checked(u32::from_le_bytes(*len) as usize));
    let (archive, messages) = parts.ok_or_else(|| {
        let detail = "its archive is longer than it is".to_owned();
        FormatError::Misplaced { what: "index page", detail }
    })?;
    let page = rkyv::access::<ArchivedMailboxPage, rancor::Error>(archive).map_err(|error| archive_error(&error))?;
    Ok((page, messages))
}

/// Validates an archive and gives a view of the value it holds, in which numbers are little-endian.
pub fn view<T>(archive: &AlignedVec) -> Result<&T::Archived, FormatError>
where
    T: rkyv::Archive,
    T::Archived:
        rkyv::Portable + for<'a> rkyv::bytecheck::CheckBytes<rkyv::api::high::HighValidator<'a, rancor::Error>>,
{
    rkyv::access::<T::Archived, rancor::Error>(archive).map_err(|error| archive_error(&error))
}

/// Validates an archive and gives the value it holds.
pub fn restore<T>(archive: &AlignedVec) -> Result<T, FormatError>
where
    T: rkyv::Archive,
    T::Archived: for<'a> rkyv::bytecheck::CheckBytes<rkyv::api::high::HighValidator<'a, rancor::Error>>
        + rkyv::Deserialize<T, rkyv::api::high::HighDeserializer<rancor::Error>>,
{
    rkyv::from_bytes::<T, rancor::Error>(archive).map_err(|error| archive_error(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Location, MessageId, ModSeq, SegmentId, ShardId, Uid};
    use crate::index::Message;
    use crate::messages::Messages;

    #[test]
    fn a_page_comes_back_and_every_flipped_bit_is_noticed() {
        let page = MailboxPage {
            flags: vec![(0, vec![1, 2, 3])],
            keywords: vec!["$Junk".to_owned()],
            expunged: vec![(9, vec![4, 5])],
            ..MailboxPage::default()
        };
        let mut bytes = Vec::new();
        let mut unpacker = Unpacker::default();
        let contents = join_mailbox(&page, b"blocks");
        put_page(PageKind::Mailbox, Lsn(5), 77, &contents, &mut Packer::default(), &mut bytes).unwrap();
        let (header, mut back) = open_page(PageKind::Mailbox, 77, &bytes, &mut unpacker).unwrap();
        let (view, messages) = split_mailbox(&back).unwrap();
        assert_eq!((header.as_of, rkyv::deserialize::<_, rancor::Error>(view).unwrap()), (Lsn(5), page));
        assert_eq!(messages, b"blocks");
        let end = back.len();
        back[end - 4..].copy_from_slice(&(end as u32 - 3).to_le_bytes());
        assert!(matches!(split_mailbox(&back), Err(FormatError::Misplaced { .. })));
        assert!(open_page(PageKind::Mailbox, 78, &bytes, &mut unpacker).is_err());
        assert!(open_page(PageKind::Directory, 77, &bytes, &mut unpacker).is_err());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(open_page(PageKind::Mailbox, 77, &damaged, &mut unpacker).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_lying_length_of_contents_is_an_error() {
        let mut bytes = Vec::new();
        put_page(PageKind::Directory, Lsn(5), 0, &[7; 10_000], &mut Packer::default(), &mut bytes).unwrap();
        for len in [9_999, 10_001, PAGE_RAW_BYTES_MAX as u32, u32::MAX] {
            bytes[20..24].copy_from_slice(&len.to_le_bytes());
            let crc = checksum(&bytes[8..]);
            bytes[4..8].copy_from_slice(&crc.to_le_bytes());
            let opened = open_page(PageKind::Directory, 0, &bytes, &mut Unpacker::default());
            assert_eq!(opened.err(), Some(FormatError::Decompress { what: "index page" }), "{len} bytes");
        }
    }

    #[test]
    fn a_page_of_a_million_messages_comes_back() {
        let message = |uid: u32| Message {
            uid: Uid(uid),
            prefix_of: 0,
            zone_minutes: 60,
            modseq: ModSeq(u64::from(uid) * 3),
            id: MessageId { origin: ShardId(1), lsn: Lsn(u64::from(uid) << 8) },
            location: Location {
                segment: SegmentId(uid >> 12),
                offset_units: uid.wrapping_mul(2_654_435_761),
                len: 2000,
                ordinal: uid & 0xfff,
            },
            head_bytes: 500,
            size: 6000,
            internal_date: 1_700_000_000,
            save_date: 1_700_000_000,
        };
        let messages: Messages = (1..=1_000_000).map(message).collect();
        let contents = join_mailbox(&MailboxPage::default(), &messages.encode());
        let mut bytes = Vec::new();
        put_page(PageKind::Mailbox, Lsn(5), 77, &contents, &mut Packer::default(), &mut bytes).unwrap();
        let (_, back) = open_page(PageKind::Mailbox, 77, &bytes, &mut Unpacker::default()).unwrap();
        assert!(Messages::decode(split_mailbox(&back).unwrap().1) == Ok(messages));
    }
}
