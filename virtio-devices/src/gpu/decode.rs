//! Requests of the control queue, from bytes to checked values. Pure: it looks at no state.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::protocol::{
    CapsetBody, CreateBlobBody, CreateContextBody, Header, MapBlobBody, MemEntry, ResourceBody, SubmitBody, cmd, resp,
};

/// The most memory entries of one blob. Linux makes one a page at worst: 64 MiB.
pub const MAX_ENTRIES: usize = 16384;

/// The longest request: a blob with [`MAX_ENTRIES`] is a quarter of this, a command stream is at most 64 KiB a command.
pub const MAX_REQUEST: usize = 1 << 20;

/// What the driver asks for.
#[derive(Debug)]
pub enum Request<'a> {
    /// Which capability set has this index?
    GetCapsetInfo(u32),
    /// What is in it?
    GetCapset {
        /// Its id.
        id: u32,
        /// In this version.
        version: u32,
    },
    /// Make a blob resource.
    CreateBlob {
        /// The fixed part.
        body: CreateBlobBody,
        /// Guest memory behind it, exactly as many as it says.
        entries: &'a [MemEntry],
    },
    /// Forget a resource.
    Unref(u32),
    /// Make the header's context.
    CreateContext {
        /// Its kind.
        init: u32,
        /// Its name, made printable.
        name: String,
    },
    /// Destroy the header's context.
    DestroyContext,
    /// Let the header's context use a resource.
    Attach(u32),
    /// No longer.
    Detach(u32),
    /// Commands for the header's context.
    Submit(&'a [u8]),
    /// Show a blob in the shared memory region.
    MapBlob {
        /// The resource.
        resource: u32,
        /// Where.
        offset: u64,
    },
    /// No longer.
    UnmapBlob(u32),
}

/// Reads one request.
///
/// # Errors
/// The answer type to give: ERR_UNSPEC for what we do not know, ERR_INVALID_PARAMETER for what is too short or
/// contradicts itself.
pub fn decode<'a>(header: &Header, bytes: &'a [u8]) -> Result<Request<'a>, u32> {
    Ok(match header.kind.get() {
        cmd::GET_CAPSET_INFO => Request::GetCapsetInfo(body::<CapsetBody>(bytes)?.0.which.get()),
        cmd::GET_CAPSET => {
            let body = body::<CapsetBody>(bytes)?.0;
            Request::GetCapset { id: body.which.get(), version: body.version.get() }
        }
        cmd::RESOURCE_CREATE_BLOB => create_blob(bytes)?,
        cmd::RESOURCE_UNREF => Request::Unref(resource(bytes)?),
        cmd::CTX_CREATE => {
            let body = body::<CreateContextBody>(bytes)?.0;
            Request::CreateContext { init: body.context_init.get(), name: name(body) }
        }
        cmd::CTX_DESTROY => Request::DestroyContext,
        cmd::CTX_ATTACH_RESOURCE => Request::Attach(resource(bytes)?),
        cmd::CTX_DETACH_RESOURCE => Request::Detach(resource(bytes)?),
        cmd::SUBMIT_3D => {
            let (body, rest) = body::<SubmitBody>(bytes)?;
            let size = usize::try_from(body.size.get()).unwrap_or(usize::MAX);
            Request::Submit(rest.get(..size).ok_or(resp::ERR_INVALID_PARAMETER)?)
        }
        cmd::RESOURCE_MAP_BLOB => {
            let body = body::<MapBlobBody>(bytes)?.0;
            Request::MapBlob { resource: body.resource_id.get(), offset: body.offset.get() }
        }
        cmd::RESOURCE_UNMAP_BLOB => Request::UnmapBlob(resource(bytes)?),
        _ => return Err(resp::ERR_UNSPEC),
    })
}

fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Result<(&T, &[u8]), u32> {
    T::ref_from_prefix(bytes).map_err(|_| resp::ERR_INVALID_PARAMETER)
}

fn resource(bytes: &[u8]) -> Result<u32, u32> {
    Ok(body::<ResourceBody>(bytes)?.0.resource_id.get())
}

fn create_blob(bytes: &[u8]) -> Result<Request<'_>, u32> {
    let (body, rest) = body::<CreateBlobBody>(bytes)?;
    let count = usize::try_from(body.nr_entries.get()).unwrap_or(usize::MAX);
    if count > MAX_ENTRIES {
        return Err(resp::ERR_INVALID_PARAMETER);
    }
    let (entries, _) =
        <[MemEntry]>::ref_from_prefix_with_elems(rest, count).map_err(|_| resp::ERR_INVALID_PARAMETER)?;
    Ok(Request::CreateBlob { body: *body, entries })
}

fn name(body: &CreateContextBody) -> String {
    let len = usize::try_from(body.nlen.get()).unwrap_or(usize::MAX).min(body.debug_name.len());
    let bytes = body.debug_name.get(..len).unwrap_or_default();
    bytes.iter().take_while(|b| **b != 0).map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect()
}
