//! Reading files that people write, and telling where in them a mistake is.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    path::{Path, PathBuf},
};

/// Longest file that is read, in bytes.
const LONGEST: u64 = 1024 * 1024;

/// A mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub path: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong and what to do.
    pub message: String,
}

impl Mistake {
    /// A mistake at this byte of `text`.
    pub fn at(path: &Path, text: &str, byte: usize, message: impl Into<String>) -> Self {
        let before = text.get(..byte).unwrap_or(text);
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        let column = before.get(start..).unwrap_or_default().chars().count() + 1;
        let line = before.matches('\n').count() + 1;
        Self { path: path.to_owned(), line, column, message: message.into() }
    }

    /// One that the TOML reader found.
    pub fn toml(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let Range { start, .. } = error.span().unwrap_or_default();
        let message = error.message().lines().collect::<Vec<_>>().join(", ");
        Self::at(path, text, start, message)
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.path.display(), self.line, self.column, self.message)
    }
}

impl std::error::Error for Mistake {}

/// Why a file's text is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The system's reason.
    #[error("cannot use {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is of another kind than it should be.
    #[error("{0} is longer than {LONGEST} bytes: it cannot be what it should be")]
    Long(PathBuf),
    /// What is written in it.
    #[error(transparent)]
    Mistake(#[from] Mistake),
}

impl TextError {
    /// What is told about a failed system call.
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// Reads a file; `None` if there is none.
pub fn read(path: &Path) -> Result<Option<String>, TextError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TextError::file(path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(TextError::file(path))?;
    if bytes.len() as u64 > LONGEST {
        return Err(TextError::Long(path.to_owned()));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes());
            Err(Mistake::at(path, &text, valid, "this is not UTF-8 text").into())
        }
    }
}

/// Writes a file that is not there yet, with its folder. It is there whole or not at all, also after a power cut.
pub fn write_new(path: &Path, text: &str) -> Result<(), TextError> {
    write(path, text, |file| file.persist_noclobber(path).map_err(|error| error.error))
}

/// Writes a file or replaces it. There is the old one or the new one, also after a power cut.
pub fn replace(path: &Path, text: &str) -> Result<(), TextError> {
    write(path, text, |file| file.persist(path).map_err(|error| error.error))
}

fn write(
    path: &Path,
    text: &str,
    put_in_place: impl FnOnce(tempfile::NamedTempFile) -> io::Result<File>,
) -> Result<(), TextError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = || {
        std::fs::create_dir_all(folder)?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        let mut file = tempfile::Builder::new().prefix(".new-").permissions(permissions).tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        put_in_place(file)?;
        File::open(folder)?.sync_all()
    };
    written().map_err(TextError::file(path))
}

/// Prints rows in columns that begin below each other.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lines_and_columns_count_from_one_and_in_characters() {
        let text = "abc\näb x\n";
        for (byte, position) in [(0, (1, 1)), (2, (1, 3)), (4, (2, 1)), (6, (2, 2)), (8, (2, 4)), (99, (3, 1))] {
            let mistake = Mistake::at(Path::new("f"), text, byte, "m");
            assert_eq!((mistake.line, mistake.column), position, "{byte}");
        }
        assert_eq!(Mistake::at(Path::new("a/f"), text, 6, "no").to_string(), "a/f:2:2: no");
    }

    #[test]
    fn absent_long_and_not_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        assert!(read(&path).unwrap().is_none());
        fs::write(&path, vec![b'a'; 1024 * 1024 + 1]).unwrap();
        assert!(matches!(read(&path), Err(TextError::Long(_))));
        fs::write(&path, b"ab\nc\xff").unwrap();
        assert!(matches!(read(&path), Err(TextError::Mistake(Mistake { line: 2, column: 2, .. }))));
        assert!(matches!(read(folder.path()), Err(TextError::File { .. })));
    }

    #[test]
    fn a_new_file_replaces_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/too/f");
        write_new(&path, "one").unwrap();
        let TextError::File { source, .. } = write_new(&path, "two").unwrap_err() else { panic!() };
        assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        replace(&path, "three").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn columns() {
        let rows = [["a", "b"], ["äöü", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a    b\näöü\n");
    }
}
