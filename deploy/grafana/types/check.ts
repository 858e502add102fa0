// Types of the dashboards: @grafana/schema, with string enums as the strings in JSON.
import type { AnnotationQuery, Dashboard, Panel } from '@grafana/schema';
import type {
  Options as BarChart,
  FieldConfig as BarChartField,
} from '@grafana/schema/dist/esm/raw/composable/barchart/panelcfg/x/BarChartPanelCfg_types.gen';
import type {
  Options as Heatmap,
  FieldConfig as HeatmapField,
} from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type { Options as Stat } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type {
  Options as StatusHistory,
  FieldConfig as StatusHistoryField,
} from '@grafana/schema/dist/esm/raw/composable/statushistory/panelcfg/x/StatusHistoryPanelCfg_types.gen';
import type {
  Options as Table,
  FieldConfig as TableField,
} from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type {
  Options as TimeSeries,
  FieldConfig as TimeSeriesField,
} from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
type Some<T> = T extends object ? { [K in keyof T]?: Some<T[K]> } : T;

// A panel of one kind: its options and its own part of the field configuration are of that kind.
type Kind<Type extends string, Options, Field = Record<string, never>> = Plain<
  Omit<Panel, 'type' | 'options' | 'fieldConfig' | 'title' | 'description' | 'id'>
> & {
  id: number;
  type: Type;
  title: string;
  description: string;
  options: Some<Plain<Options>>;
  fieldConfig: {
    defaults: Plain<Omit<NonNullable<Panel['fieldConfig']>['defaults'], 'custom' | 'unit'>> & {
      unit: string;
      custom?: Some<Plain<Field>>;
    };
    overrides: Plain<NonNullable<Panel['fieldConfig']>['overrides']>;
  };
};

// The query of an annotation is the data source's own, as a panel's is.
type Annotation = Plain<Omit<AnnotationQuery, 'target'>> & { target?: Record<string, unknown> };

export type Board = Plain<Omit<Dashboard, 'panels' | 'annotations'>> & {
  uid: string;
  annotations?: { list: Annotation[] };
  panels: Array<
    | Kind<'barchart', BarChart, BarChartField>
    | Kind<'heatmap', Heatmap, HeatmapField>
    | Kind<'stat', Stat>
    | Kind<'status-history', StatusHistory, StatusHistoryField>
    | Kind<'table', Table, TableField>
    | Kind<'timeseries', TimeSeries, TimeSeriesField>
  >;
};
