"""Names of the package for type checkers and editors; `__init__.py` loads them when they are used."""

from raysl.api import cluster as cluster
from raysl.api import clusterfit as clusterfit
from raysl.api import doctor as doctor
from raysl.api import export as export
from raysl.api import features as features
from raysl.api import ingest as ingest
from raysl.api import pretrain as pretrain
from raysl.api import probe as probe
from raysl.api import report as report
from raysl.api import reproduce as reproduce
from raysl.api import sweep as sweep
from raysl.api import views as views
from raysl.backbone.network import BackboneConfig as BackboneConfig
from raysl.checkpoint import SaveConfig as SaveConfig
from raysl.clustering.cluster_and_fit import ClusterfitConfig as ClusterfitConfig
from raysl.clustering.options import KMeansConfig as KMeansConfig
from raysl.config import Pretraining as Pretraining
from raysl.config import ViewConfig as ViewConfig
from raysl.contrastive.bank import BankConfig as BankConfig
from raysl.dataset import DataSet as DataSet
from raysl.diagnostics import DoctorConfig as DoctorConfig
from raysl.errors import Interrupted as Interrupted
from raysl.errors import UserError as UserError
from raysl.evaluation.results import rows as rows
from raysl.extraction.features import FeaturesConfig as FeaturesConfig
from raysl.extraction.inference import FeatureExtractor as FeatureExtractor
from raysl.extraction.inference import load as load
from raysl.ingestion.pipeline import IngestConfig as IngestConfig
from raysl.model_export import ExportConfig as ExportConfig
from raysl.optim import OptimConfig as OptimConfig
from raysl.reporting.page import ReportConfig as ReportConfig
from raysl.run import Run as Run
from raysl.run.callbacks import Callback as Callback
from raysl.run.callbacks import MLflowLogger as MLflowLogger
from raysl.run.callbacks import TensorBoardLogger as TensorBoardLogger
from raysl.run.callbacks import WandbLogger as WandbLogger
from raysl.stream.reader import StreamConfig as StreamConfig
from raysl.training.reproduction import ReproduceConfig as ReproduceConfig
from raysl.tuning.config import SweepConfig as SweepConfig
from raysl.tuning.trainable import tune_trainable as tune_trainable

__all__: list[str]
__version__: str
