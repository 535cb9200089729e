//! The folders that make a model: the checkpoint's own and, for an original LLaVA, that of its vision tower,
//! which is looked for where people keep it.

use super::checkpoint::LoadMode;
use super::config::ModelConfig;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::folder::Folder;
use std::fs;
use std::path::{Path, PathBuf};

/// A checkpoint's folder, and the one of its tower.
#[derive(Clone, Debug)]
pub struct Parts {
    folder: Folder,
    tower: Option<Tower>,
}

/// A vision tower that the checkpoint names.
#[derive(Clone, Debug)]
struct Tower {
    /// Its name in the checkpoint's `config.json`.
    name: String,
    /// Its folder, if there is one.
    folder: Option<Folder>,
    /// Where it was looked for.
    places: Vec<PathBuf>,
}

/// Where to look for a vision tower.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TowerSearch {
    /// The folder, if the user says it.
    pub given: Option<PathBuf>,
    /// A cache in Hugging Face's layout, `models--ORG--NAME/snapshots/*`.
    pub hub_cache: Option<PathBuf>,
}

impl Parts {
    /// The parts of the checkpoint in `folder`. A tower that is apart from the model is, in this order: the
    /// folder that `search` gives; the path in `config.json`, taken from the model's folder; a folder of the
    /// tower's name, or called `vision_tower`, in the model's or beside it; a cache in Hugging Face's
    /// layout there, around the model, or the one that `search` gives.
    ///
    /// # Errors
    /// [`Error::Option`] for a given folder that holds no tower, or for a checkpoint that wants none; whatever
    /// is wrong with its `config.json`.
    pub fn find(folder: &Folder, search: &TowerSearch) -> Result<Self> {
        let folder = folder.clone();
        let name = ModelConfig::tower_name(&folder)?;
        let Some(name) = name else {
            return match &search.given {
                None => Ok(Parts { folder, tower: None }),
                Some(given) => {
                    let expected =
                        "none: this checkpoint is not in the original LLaVA layout, or names no tower";
                    Err(Error::option("--vision-tower", expected, given.display()))
                }
            };
        };
        let places = match &search.given {
            Some(given) => vec![given.clone(), snapshot(given)],
            None => places(&folder, &name, search.hub_cache.as_deref()),
        };
        let found = places.iter().find(|place| place.join(CONFIG).is_file());
        if let (Some(given), None) = (&search.given, found) {
            let expected = format!("a folder with the {CONFIG} and the weights of a CLIP tower");
            return Err(Error::option("--vision-tower", expected, given.display()));
        }
        let tower = Tower { folder: found.map(Folder::from), name, places };
        Ok(Parts { folder, tower: Some(tower) })
    }

    /// The checkpoint's folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The tower's folder, where that is another.
    pub fn tower(&self) -> Option<&Folder> {
        self.tower.as_ref()?.folder.as_ref()
    }

    /// What the configurations say together.
    ///
    /// # Errors
    /// Whatever is wrong with them, named.
    pub fn config(&self) -> Result<ModelConfig> {
        ModelConfig::load_with_tower(&self.folder, self.tower())
    }

    /// The tensors. A tower in the checkpoint's own files wins over the one apart: it may have been trained.
    ///
    /// # Errors
    /// As for [`Weights::open`], and [`Error::Checkpoint`] with the places if there is no tower anywhere.
    pub fn weights(&self, mode: LoadMode) -> Result<Weights> {
        let weights = Weights::open(&self.folder, mode)?;
        let Some(tower) = &self.tower else { return Ok(weights) };
        if weights.has_part(TOWER) {
            return Ok(weights);
        }
        match &tower.folder {
            Some(folder) => weights.with_part(TOWER, Weights::open(folder, mode)?),
            None => {
                let places: Vec<_> = tower.places.iter().map(|place| place.display().to_string()).collect();
                let problem = format!(
                    "has no vision tower inside and names `{}`, which is not found; download it and say where with \
                     --vision-tower. Looked for: {}",
                    tower.name,
                    places.join(", ")
                );
                Err(Error::checkpoint(self.folder.path(CONFIG), problem))
            }
        }
    }

    /// The name by which the original code chooses a conversation style: that of the checkpoint's folder, with
    /// its parent's before it for a `checkpoint-N`; in a cache, that of the repository.
    pub fn name(&self) -> String {
        let Folder::Directory(dir) = &self.folder else { return self.folder.path("").display().to_string() };
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.clone());
        let mut names = dir.iter().rev().map(|name| name.to_string_lossy().into_owned());
        let (last, parent, above) = (names.next().unwrap_or_default(), names.next(), names.next());
        match (parent.as_deref(), above) {
            (Some("snapshots"), Some(repository)) => repository,
            (Some(parent), _) if last.starts_with("checkpoint-") => format!("{parent}_{last}"),
            _ => last,
        }
    }
}

const CONFIG: &str = "config.json";
const TOWER: &str = "vision.";

/// Where a tower called `name` may be, most likely first.
fn places(folder: &Folder, name: &str, hub_cache: Option<&Path>) -> Vec<PathBuf> {
    let Folder::Directory(dir) = folder else { return Vec::new() };
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.clone());
    let last = name.trim_end_matches('/').rsplit('/').next().unwrap_or(name);
    let around: Vec<&Path> = dir.ancestors().take(2).collect();
    let mut places = vec![dir.join(name)];
    places.extend(around.iter().flat_map(|dir| [dir.join(last), dir.join("vision_tower")]));
    // The model itself may lie in a cache: CACHE/models--ORG--NAME/snapshots/REVISION.
    let cache = dir.ancestors().nth(3).filter(|_| dir.parent().is_some_and(|dir| dir.ends_with("snapshots")));
    let repository = format!("models--{}", name.replace('/', "--"));
    let caches = around.iter().copied().chain(cache).chain(hub_cache);
    places.extend(caches.map(|cache| snapshot(&cache.join(&repository))));
    places
}

/// The revision of a cached repository that `refs/main` names, or else the only one there is.
fn snapshot(repository: &Path) -> PathBuf {
    let snapshots = repository.join("snapshots");
    // A revision is 40 hexadecimal digits.
    let main = crate::folder::read_file(&repository.join("refs/main")).ok().flatten();
    let main = main.and_then(|bytes| String::from_utf8(bytes).ok()).map(|text| text.trim().to_string());
    if let Some(main) = main.filter(|main| !main.is_empty() && main.bytes().all(|b| b.is_ascii_hexdigit())) {
        return snapshots.join(main);
    }
    let entries: Vec<_> = fs::read_dir(&snapshots).into_iter().flatten().flatten().collect();
    match entries.as_slice() {
        [only] => only.path(),
        _ => snapshots,
    }
}
