//! The folders that make a model: the checkpoint's own; that of its language model, if the checkpoint is an adapter or
//! a projector alone; and, for an original LLaVA, that of its vision tower, which is looked for where people keep it.

use super::checkpoint::{LoadMode, has_weights};
use super::config::ModelConfig;
use super::json;
use super::lora::Lora;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::folder::Folder;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The folders of a model, and the adapters that are laid over it.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Where `config.json` is, and whose name tells the conversation style.
    folder: Folder,
    /// Where the language model is: its weights and tokenizer. Mostly the same.
    base: Folder,
    tower: Option<Tower>,
    adapters: Vec<Lora>,
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
    /// The parts of the checkpoint in `model` under the adapters `lora`.
    ///
    /// The checkpoint may be an adapter, or a projector (`mm_projector.bin`) with its `config.json`, that was trained
    /// over the model in `base`. The other way round, an adapter that LLaVA's own training left, with LLaVA's
    /// `config.json` beside it, makes a LLaVA of the bare language model that it is laid over.
    ///
    /// A tower that is apart from the model is, in this order: the folder that `search` gives; the path in
    /// `config.json`, taken from the model's folder; a folder of the tower's name, or called `vision_tower`, in the
    /// model's or beside it; a cache in Hugging Face's layout there, around the model, or the one that `search`
    /// gives. The model's folder is the one that is named and, if that is a symbolic link, the one it leads to.
    ///
    /// # Errors
    /// [`Error::Option`] for a given folder that holds no tower, or for a checkpoint that wants none, or no `base`;
    /// [`Error::Checkpoint`] for an adapter without a `base`; whatever is wrong with the configurations.
    pub fn find(model: &Folder, base: Option<&Path>, lora: &[Lora], search: &TowerSearch) -> Result<Self> {
        let (folder, base, adapters) = pieces(model, base, lora)?;
        let parts = |tower| Parts { folder: folder.clone(), base: base.clone(), tower, adapters };
        let Some(name) = ModelConfig::tower_name(&folder)? else {
            return match &search.given {
                None => Ok(parts(None)),
                Some(given) => {
                    let expected =
                        "none: this checkpoint is not in the original LLaVA layout, or names no tower";
                    Err(Error::option("--vision-tower", expected, given.display()))
                }
            };
        };
        let places = match &search.given {
            Some(given) => vec![given.clone(), snapshot(given)],
            None => places(&[&folder, &base], &name, search.hub_cache.as_deref()),
        };
        let found = places.iter().find(|place| place.join(CONFIG).is_file());
        if let (Some(given), None) = (&search.given, found) {
            let expected = format!("a folder with the {CONFIG} and the weights of a CLIP tower");
            return Err(Error::option("--vision-tower", expected, given.display()));
        }
        let tower = Tower { folder: found.map(Folder::from), name, places };
        Ok(parts(Some(tower)))
    }

    /// The folder of the language model's weights and tokenizer.
    pub fn base(&self) -> &Folder {
        &self.base
    }

    /// The folder of `config.json`.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The adapters: the checkpoint itself, if it is one, then those that were asked for.
    pub fn adapters(&self) -> &[Lora] {
        &self.adapters
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

    /// The tensors, without the adapters: those in the folder of the language model, and what is apart from them, a
    /// projector or a tower. A tower in the checkpoint's own files wins over the one apart: it may have been trained.
    ///
    /// # Errors
    /// As for [`Weights::open`], and [`Error::Checkpoint`] with the places if there is no tower anywhere.
    pub fn complete(&self, weights: Weights, mode: LoadMode) -> Result<Weights> {
        let weights = self.with_projector(weights, mode)?;
        let Some(tower) = &self.tower else { return Ok(weights) };
        if weights.has_part(TOWER) {
            return Ok(weights);
        }
        match &tower.folder {
            Some(folder) => weights.with_part(&[TOWER], Weights::open(folder, mode)?),
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

    /// `weights` with what LLaVA's training left beside them, in a folder of its own: a projector, a newline.
    fn with_projector(&self, mut weights: Weights, mode: LoadMode) -> Result<Weights> {
        let Folder::Directory(dir) = &self.folder else { return Ok(weights) };
        for stem in ["non_lora_trainables", "mm_projector"] {
            if self.folder != self.base
                && !weights.has_part(PROJECTOR)
                && let Some(trained) = Weights::open_named(dir, stem, mode)?
            {
                weights = weights.with_part(&[PROJECTOR, "image_newline"], trained)?;
            }
        }
        Ok(weights)
    }

    /// The names that may tell a conversation style, of which the first that does decides: that of the checkpoint's
    /// folder as it was given and, if that is a symbolic link, as it is called where the link leads. A name is as
    /// the original code makes it: the folder's, with its parent's before it for a `checkpoint-N`; in a cache, the
    /// repository's.
    pub fn names(&self) -> Vec<String> {
        match &self.folder {
            Folder::Directory(dir) => given_and_resolved(dir).iter().map(|dir| name(dir)).collect(),
            built_in => vec![built_in.path("").display().to_string()],
        }
    }
}

/// The folder of the configuration, the folder of the language model, and all adapters: see [`Parts::find`].
fn pieces(model: &Folder, base: Option<&Path>, lora: &[Lora]) -> Result<(Folder, Folder, Vec<Lora>)> {
    let dir = match model {
        Folder::Directory(dir) if !has_weights(dir) => dir,
        whole => {
            return match base {
                Some(base) => {
                    let expected =
                        "none: this model has weights of its own; an adapter is laid over it with --lora";
                    Err(Error::option("--base", expected, base.display()))
                }
                None => Ok((llava_over(whole, lora)?.unwrap_or(whole.clone()), whole.clone(), lora.to_vec())),
            };
        }
    };
    let is_adapter = dir.join(ADAPTER).is_file();
    match base {
        None if is_adapter => {
            let map = json::read_object(model, ADAPTER)?;
            let of = map.get("base_model_name_or_path").and_then(|name| name.as_str());
            let of = of.map_or(String::new(), |name| format!(" of `{name}`"));
            let problem =
                format!("is an adapter{of} and no whole model; say with --base where that model is");
            Err(Error::checkpoint(dir, problem))
        }
        None => Ok((model.clone(), model.clone(), lora.to_vec())),
        Some(base) if is_adapter => {
            let own = Lora { dir: dir.clone(), scale: 1.0 };
            let adapters = [&[own], lora].concat();
            let configured = if dir.join(CONFIG).is_file() { model.clone() } else { base.into() };
            Ok((configured, base.into(), adapters))
        }
        Some(base) if dir.join("mm_projector.bin").is_file() => {
            Ok((model.clone(), base.into(), lora.to_vec()))
        }
        Some(_) => {
            let problem = format!(
                "holds neither weights, nor an adapter ({ADAPTER}) or a projector (mm_projector.bin)"
            );
            Err(Error::checkpoint(dir, problem))
        }
    }
}

/// The folder of the adapter that makes a LLaVA of the bare language model in `base`, if one does.
fn llava_over(base: &Folder, lora: &[Lora]) -> Result<Option<Folder>> {
    if lora.is_empty() || !ModelConfig::is_text(base)? {
        return Ok(None);
    }
    for adapter in lora.iter().filter(|adapter| adapter.dir.join(CONFIG).is_file()) {
        let folder = Folder::from(&adapter.dir);
        if ModelConfig::tower_name(&folder)?.is_some() {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}

/// What the original code calls the model in `dir`.
fn name(dir: &Path) -> String {
    let mut names = dir.iter().rev().map(|name| name.to_string_lossy().into_owned());
    let (last, parent, above) = (names.next().unwrap_or_default(), names.next(), names.next());
    match (parent.as_deref(), above) {
        (Some("snapshots"), Some(repository)) => repository,
        (Some(parent), _) if last.starts_with("checkpoint-") => format!("{parent}_{last}"),
        _ => last,
    }
}

/// `dir` as an absolute path, and where it leads, if that is elsewhere.
fn given_and_resolved(dir: &Path) -> Vec<PathBuf> {
    let mut dirs: Vec<_> = [std::path::absolute(dir), fs::canonicalize(dir)].into_iter().flatten().collect();
    dirs.dedup();
    dirs
}

const CONFIG: &str = "config.json";
const ADAPTER: &str = "adapter_config.json";
const TOWER: &str = "vision.";
const PROJECTOR: &str = "projector.";

/// Where a tower called `name` may be, most likely first.
fn places(folders: &[&Folder], name: &str, hub_cache: Option<&Path>) -> Vec<PathBuf> {
    let last = name.trim_end_matches('/').rsplit('/').next().unwrap_or(name);
    let repository = format!("models--{}", name.replace('/', "--"));
    let mut places = Vec::new();
    for folder in folders {
        let Folder::Directory(dir) = folder else { continue };
        for dir in given_and_resolved(dir) {
            let around: Vec<&Path> = dir.ancestors().take(2).collect();
            places.push(dir.join(name));
            places.extend(around.iter().flat_map(|dir| [dir.join(last), dir.join("vision_tower")]));
            // The model itself may lie in a cache: CACHE/models--ORG--NAME/snapshots/REVISION.
            let cached = dir.parent().is_some_and(|dir| dir.ends_with("snapshots"));
            let caches = around.iter().copied().chain(dir.ancestors().nth(3).filter(|_| cached));
            places.extend(caches.map(|cache| snapshot(&cache.join(&repository))));
        }
    }
    places.extend(hub_cache.map(|cache| snapshot(&cache.join(&repository))));
    let mut seen = BTreeSet::new();
    places.retain(|place| seen.insert(place.clone()));
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
