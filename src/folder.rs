//! Where the files of a model are: in a directory, in the program itself, or in memory.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The files of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Folder {
    /// A directory, as a download from the Hub leaves it.
    Directory(PathBuf),
    /// Files that were compiled in.
    BuiltIn {
        /// What errors and listings call the folder.
        name: &'static str,
        /// Names and contents.
        files: &'static [(&'static str, &'static [u8])],
    },
    /// Files that were made for the purpose, and lie nowhere.
    Made {
        /// What errors and listings call the folder.
        name: String,
        /// Names and contents.
        files: Vec<(&'static str, Vec<u8>)>,
    },
}

impl<P: Into<PathBuf>> From<P> for Folder {
    fn from(dir: P) -> Self {
        Folder::Directory(dir.into())
    }
}

impl Folder {
    /// What errors call the file `name` of this folder.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Folder::Directory(dir) => dir.join(name),
            Folder::BuiltIn { name: folder, .. } => Path::new(folder).join(name),
            Folder::Made { name: folder, .. } => Path::new(folder).join(name),
        }
    }

    /// The whole of a file, or `None` if there is none of that name.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] for a file of more than 64 MiB, or one that is no regular file: a
    /// pipe could be read for ever.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match self {
            Folder::BuiltIn { files, .. } => {
                Ok(files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.to_vec()))
            }
            Folder::Made { files, .. } => {
                Ok(files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.clone()))
            }
            Folder::Directory(dir) => read_file(&dir.join(name)),
        }
    }
}

/// Larger than any configuration, tokenizer or index in the wild (tokenizers have up to 17 MB).
pub const MAX_TEXT_BYTES: u64 = 64 << 20;

/// The whole of a regular file of at most 64 MiB, or `None` if it does not exist.
///
/// # Errors
/// As for [`Folder::read`].
pub fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let io = |source| Error::io(path, source);
    let metadata = match fs::metadata(path) {
        // A name that runs through a file, as `config.json/x`, names nothing either.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        other => other.map_err(io)?,
    };
    if !metadata.is_file() {
        return Err(Error::checkpoint(path, "is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(Error::checkpoint(path, format!("is larger than {MAX_TEXT_BYTES} bytes")));
    }
    Ok(Some(bytes))
}
